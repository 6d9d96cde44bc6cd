"""Put a folder that a converter has written into object storage, to train from there.

    upload_dataset.py DIR URL

URL is msc://PROFILE/FOLDER (a profile of multi-storage-client) or s3://BUCKET/FOLDER; it becomes DATASET_PATH.  Until
all is there and the sizes agree, the folder is no dataset.  Interrupted, the same command begins again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import toolkits.environment  # noqa: F401
from megatron_patch.data.preparation.upload import check_target
from megatron_patch.errors import UserError
from toolkits.multimodal_data_preprocessing.command_line import FINE, INTERRUPTED, WRONG_INPUT, upload


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="as a converter has written it")
    parser.add_argument("url", metavar="URL", help="msc://PROFILE/FOLDER or s3://BUCKET/FOLDER, without a dataset")
    arguments = parser.parse_args()
    try:
        check_target(arguments.url)
        upload(arguments.folder, arguments.url)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command begins again", file=sys.stderr)
        return INTERRUPTED
    return FINE


if __name__ == "__main__":
    sys.exit(main())
