"""What a loader must know, read once and then frozen."""

from dataclasses import dataclass

from megatron_patch.errors import UserError
from megatron_patch.llava_folder import ANY_RESOLUTION, IMAGE_ASPECT_RATIOS
from megatron_patch.step_balance import RecordCost
from megatron_patch.tile_plan import AnyResolution, TilePlan, fixed_tiles, video_plan, whole_image

GROUPED = ("modality", "modality_window")
ORDERS = ("cyclic", "single", *GROUPED)


@dataclass(frozen=True)
class DataConfig:
    """Settings of the train and valid loaders; equal config and paths give equal batches on every machine."""

    tokenizer_path: str  # folder that AutoTokenizer reads, `llava/` of a checkpoint
    template: str  # a name of conversation.TEMPLATES or a template file; `auto` is resolved by the caller
    image_token_id: int  # id of the `<image>` placeholder
    image_tokens: int  # placeholders per image: the vision tower's patch count
    side_px: int  # images become side_px x side_px
    image_mean: tuple[float, float, float]  # in 0..1, the colour of the padding
    # crop: as the tower's processor does; pad: to a square with the mean colour first; stretch: squeezed to the square;
    # anyres: as any_resolution says
    image_aspect_ratio: str
    decoder_seq_len: int  # longest record in tokens, image placeholders included
    micro_batch_size: int  # records per batch
    length_multiple: int  # batch lengths are padded up to a multiple of this
    seed: int  # of the order of the records
    num_workers: int  # processes that prepare batches; 0: in this process
    center_crop: bool = (
        True  # CLIP's way: shorter side to side_px, then the centre; False, SigLIP's: squeezed to a square
    )
    resample: int = 3  # Pillow's number of the filter: 2 bilinear, 3 bicubic
    max_skipped_share: float = 0.01  # a run stops when more of its records than this had to be skipped
    image_conv_front: bool = False  # images come before the whole conversation (NeMo's sep_image_conv_front)
    image_start_end: bool = False  # each image stands between <im_start> and <im_end> (LLaVA's use_im_start_end)
    apply_exif_orientation: bool = True  # False: images as they lie in the file, as LLaVA's original code
    tile_columns: int = 1  # with tile_rows: every image becomes columns x rows tiles and a thumbnail
    tile_rows: int = 1
    any_resolution: AnyResolution | None = None  # the rule of a model that has one; its batches hold plans
    video_token_id: int | None = None  # id of the `<video>` placeholder; None: the model knows none
    # cyclic: shuffled each epoch; single: as stored; modality: shuffled, text and images apart, like lengths together;
    # modality_window: the same within windows of records
    order: str = "cyclic"
    step_records: int = 0  # with a grouped order or balance_cost: records of an optimizer step
    mega_batch_mult: int = 0  # with a grouped order: steps that are sorted by length together
    packing: bool = False  # records fill rows of decoder_seq_len together, none attends to another
    # batches whose rows would be padded hold their records in one row instead, as packed ones do
    padding_free: bool = False
    record_multiple: int = 1  # in one row: each record's place in a row is padded up to a multiple of this
    # a step's records are dealt so that all ranks have as much to do; None: ranks take turns
    balance_cost: RecordCost | None = None
    feature_cache: str | None = None  # folder whose features training is given in place of pixels (feature_cache.py)
    length_step: int = 1  # batch lengths are padded up to a multiple of this too, so that few different ones occur

    def __post_init__(self) -> None:
        """Refuse config that cannot work, all at once."""
        problems = [
            f"{name} is {getattr(self, name)}, wanted at least {least}"
            for name, least in (
                ("image_tokens", 1),
                ("side_px", 1),
                ("micro_batch_size", 1),
                ("length_multiple", 1),
                ("length_step", 1),
                ("num_workers", 0),
                ("seed", 0),
                ("tile_columns", 1),
                ("tile_rows", 1),
            )
            if getattr(self, name) < least
        ]
        if self.resample not in range(6):
            problems.append(f"resample is {self.resample}, wanted a filter of Pillow, from 0 to 5")
        for name, allowed in (("image_aspect_ratio", IMAGE_ASPECT_RATIOS), ("order", ORDERS)):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} is {getattr(self, name)!r}, wanted {' or '.join(allowed)}")
        if self.sizes_matter:
            if self.any_resolution is None:
                problems.append("image_aspect_ratio anyres is for a model that sees images at any resolution")
            if self.tiles > 1:
                problems.append("image_aspect_ratio anyres and fixed tiles exclude each other")
        if self.order in GROUPED:
            for name in ("step_records", "mega_batch_mult"):
                if getattr(self, name) < 1:
                    problems.append(f"{name} is {getattr(self, name)}, wanted at least 1 with order {self.order}")
            if self.packing:
                problems.append(f"order {self.order} and packing exclude each other: packed rows are all of one length")
        if self.balance_cost is not None:
            if self.step_records < 1:
                problems.append(f"step_records is {self.step_records}, wanted at least 1 with balance_cost")
            if self.packing:
                problems.append("balance_cost and packing exclude each other: packed rows are all of one length")
        if not problems and self.longest_record <= self.tokens_per_mark:
            problems.append(
                f"decoder_seq_len {self.decoder_seq_len} (in multiples of {self.length_multiple}: "
                f"{self.longest_record}) leaves no room for text beside the {self.tokens_per_mark} tokens of one "
                "image; raise DECODER_SEQ_LEN"
            )
        if problems:
            raise UserError("data config: " + "; ".join(problems))

    @property
    def tiles(self) -> int:
        """Images that the tower sees for one of the record's, in fixed tiles."""
        return fixed_tiles(self.tile_columns, self.tile_rows)

    @property
    def tokens_per_mark(self) -> int:
        """Placeholders that stand for one image of a record."""
        return self.image_tokens * self.tiles

    @property
    def sizes_matter(self) -> bool:
        """Does an image's size decide how many tokens it takes?"""
        return self.image_aspect_ratio == ANY_RESOLUTION

    def image_plan(self, size: tuple[int, int] | None, images: int) -> TilePlan:
        """Plan of one of so many images of a record; size (height, width) may be None where sizes do not matter."""
        if self.sizes_matter:
            return self.any_resolution.plan(size, images)
        return whole_image(self.image_tokens, self.tiles)

    @property
    def sees_videos(self) -> bool:
        """Of a model that knows none, or is shown every image as one tile, records with videos are left out."""
        return self.video_token_id is not None and self.sizes_matter

    def video_plan(self, frames: int) -> TilePlan:
        """Plan of a video of so many frames, of a model that sees videos."""
        return video_plan(frames, self.any_resolution.patches)

    @property
    def longest_record(self) -> int:
        """Largest multiple of length_multiple within decoder_seq_len, so that padding never exceeds the latter."""
        return self.decoder_seq_len - self.decoder_seq_len % self.length_multiple

    def padded_length(self, tokens: int) -> int:
        """Length of a batch whose longest row has so many tokens; at most longest_record, if they are."""
        step = round_up(self.length_step, self.length_multiple)
        return max(round_up(tokens, self.length_multiple), min(round_up(tokens, step), self.longest_record))


def round_up(number: int, multiple: int) -> int:
    """Smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple
