"""LLaVA-Video JSON and its videos -> shards that LLaVA-OneVision trains on: frames of each video, stored as images.

A record's "video" names a file (decoded by PyAV: pip install av), a folder of frames, or a list of such; its text holds
<video> marks, or <image> as LLaVA-Video-178K writes it.  Records with images or text alone may stand among them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.data.preparation.sources import LlavaVideoSource
from megatron_patch.data.video import FORMATS, FrameSampling
from toolkits.multimodal_data_preprocessing.command_line import add_image_root, find_image_roots, parser_of, run


def main() -> int:
    """Command line; returns the exit code."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("json", type=Path, metavar="FILE.json", help="a list or one record per line; shards go to wds/ beside it")
    add_image_root(parser, "images/ beside FILE.json, then its folder")
    add(
        "--video-root",
        type=Path,
        action="append",
        metavar="DIR",
        help="where the records' video names start; may be repeated; default: videos/ beside FILE.json, its folder",
    )
    add("--frames", type=int, default=32, metavar="N", help="of each video, at equal distances; default: 32")
    add(
        "--fps", type=float, metavar="F", help="F frames of each second instead, where that gives no more than --frames"
    )
    add("--frame-format", choices=FORMATS, default="jpeg", help="of decoded frames; default: jpeg")
    add("--frame-quality", type=int, default=90, metavar="Q", help="of JPEG frames, 1 to 95; default: 90")
    return run(parser.parse_args(), make)


def make(arguments: argparse.Namespace) -> tuple[LlavaVideoSource, Path]:
    """The source that the arguments name.  Raises UserError."""
    folder = arguments.json.parent
    sampling = FrameSampling(arguments.frames, arguments.fps, arguments.frame_format, arguments.frame_quality)
    roots = tuple(arguments.video_root or (path for path in (folder / "videos", folder) if path.is_dir()))
    images = find_image_roots(folder, arguments.image_root)
    return LlavaVideoSource(arguments.json, images, roots, sampling), folder / "wds"


if __name__ == "__main__":
    sys.exit(main())
