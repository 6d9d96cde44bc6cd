"""The report of weights that do not fit, and the names that model and converter share."""

import pytest

from megatron_patch.errors import UserError
from megatron_patch.weight_names import (
    EMBEDDING,
    HEAD,
    check_nothing_differs,
    differences,
    with_transformer_engine_norms,
    without_padding,
)


def test_every_difference_is_listed_counted_and_cut() -> None:
    wanted = {"a": (2, 3), "b": (2,), **{f"w{number}": () for number in range(10)}}
    found = {"a": (2, 4), "b": [2], "z": (1,)}
    with pytest.raises(UserError) as caught:
        check_nothing_differs("x does not fit; convert it again", differences(found, wanted, "the model has"))
    assert str(caught.value).splitlines() == [
        "x does not fit; convert it again:",
        "  missing (10): w0, w1, w2, w3, w4, w5, w6, w7, ... (2 more)",
        "  unknown (1): z",
        "  of another shape or dtype (1): a is [2, 4], the model has [2, 3]",
    ]
    check_nothing_differs("x", differences(wanted, wanted, "the model has"))
    with pytest.raises(UserError, match=r"unknown \(0\): none"):
        check_nothing_differs("x", differences({}, {"a": ()}, "the model has"))


@pytest.mark.parametrize(
    ("rows", "fits"), [(256, True), (128, True), (101, True), (100, False)], ids=["more", "equal", "less", "too few"]
)
def test_padding_of_the_vocabulary_may_differ(rows: int, fits: bool) -> None:
    """101 tokens, padded to 128 rows here: the checkpoint may hold them padded otherwise, but all of them."""
    wanted = {EMBEDDING: (128, 8), HEAD: (128, 8), "other": (128, 8)}
    found = {EMBEDDING: (rows, 8), HEAD: (rows, 8), "other": (128, 8)}
    assert (without_padding(found, wanted, 101) == wanted) == fits
    for odd in ({EMBEDDING: (256, 9)}, {"other": (256, 8)}):
        assert without_padding(wanted | odd, wanted, 101) == wanted | odd
    assert without_padding({}, wanted, 101) == {}


def test_norms_get_the_names_of_checkpoints() -> None:
    layer = "language_model.decoder.layers.3."
    for local, stored in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.bias", "mlp.linear_fc1.layer_norm_bias"),
        ("mlp.linear_fc2.weight", "mlp.linear_fc2.weight"),
    ):
        assert with_transformer_engine_norms(layer + local) == layer + stored
