"""What a loader must know, read once and then frozen."""

from dataclasses import dataclass

from megatron_patch.errors import UserError

IMAGE_ASPECT_RATIOS = ("crop", "pad")


@dataclass(frozen=True)
class DataSettings:
    """Settings of the train and valid loaders; equal settings and paths give equal batches on every machine."""

    tokenizer_path: str  # folder that AutoTokenizer reads, `llava/` of a checkpoint
    template: str  # a name of conversation.TEMPLATES; `auto` is resolved by the caller
    image_token_id: int  # id of the `<image>` placeholder
    image_tokens: int  # placeholders per picture: the vision tower's patch count
    side_px: int  # pictures become side_px x side_px
    image_mean: tuple[float, float, float]  # in 0..1, the colour of the padding
    image_aspect_ratio: str  # crop: as the tower's processor does; pad: to a square with the mean colour first
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

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, all at once."""
        problems = [
            f"{name} is {getattr(self, name)}, wanted at least {least}"
            for name, least in (
                ("image_tokens", 1),
                ("side_px", 1),
                ("micro_batch_size", 1),
                ("length_multiple", 1),
                ("num_workers", 0),
                ("seed", 0),
            )
            if getattr(self, name) < least
        ]
        if self.resample not in range(6):
            problems.append(f"resample is {self.resample}, wanted a filter of Pillow, from 0 to 5")
        if self.image_aspect_ratio not in IMAGE_ASPECT_RATIOS:
            wanted = " or ".join(IMAGE_ASPECT_RATIOS)
            problems.append(f"image_aspect_ratio is {self.image_aspect_ratio!r}, wanted {wanted}")
        if not problems and self.longest_record <= self.image_tokens:
            problems.append(
                f"decoder_seq_len {self.decoder_seq_len} (in multiples of {self.length_multiple}: "
                f"{self.longest_record}) leaves no room for text beside the {self.image_tokens} tokens of one picture; "
                "raise DECODER_SEQ_LEN"
            )
        if problems:
            raise UserError("data settings: " + "; ".join(problems))

    @property
    def longest_record(self) -> int:
        """Largest multiple of length_multiple within decoder_seq_len, so that padding never exceeds the latter."""
        return self.decoder_seq_len - self.decoder_seq_len % self.length_multiple
