"""select_layers and the controls: which layers are chosen, and what is refused."""

import doctest
import json
import math

import pytest

import trimtab.where
from trimtab import plans
from trimtab.errors import ConfigError, SelectionError
from trimtab.plans import Where
from trimtab.where import cka, controls, first, from_mask, importance, last, random, uniform
from trimtab.where.cka import LayerScores, StackScores, select_layers

# Layer-wise LoRA with CKA, figure in the authors' appendix (RoBERTa-base, layers 0 to 11) and the masks in their
# scripts: what they publish as data, read off to ±0.0005.
PUBLISHED = {
    "mrpc": ("010110010011", ".0 .8246 .8905 .4828 .7671 .9726 .9407 .7163 .9009 .9364 .1446 .2976"),
    "cola": ("000110110110", ".0 .9292 .9471 .6496 .6204 .9539 .7284 .6452 .8287 .8058 .2937 .8942"),
    "qqp": ("010100110011", ".0 .8655 .9396 .7091 .8982 .9822 .8435 .5043 .9037 .9236 .0874 .5451"),
    "sst2": ("000000111111", ".0 .9547 .9831 .9206 .9169 .9873 .8854 .7899 .8844 .8638 .5026 .6480"),
    "rte": ("011100100011", ".0 .7716 .9483 .9419 .9626 .9910 .9356 .9661 .9952 .9935 .9382 .3192"),
    "mnli": ("000110110011", ".0 .8942 .9301 .6031 .8894 .9794 .7158 .8776 .9859 .9850 .3371 .5997"),
    "stsb": ("010100110011", ".0 .8355 .9499 .8098 .9600 .9867 .8690 .6778 .9310 .9406 .3547 .8572"),
    "qnli": ("000110110011", ".0 .8506 .8980 .7474 .8000 .9139 .6844 .7087 .9074 .9222 .0980 .4694"),
}


def scores(values, undefined=(), pool="last", path="layers"):
    stack = StackScores(tuple(values), tuple(i in undefined for i in range(len(values))))
    return LayerScores({path: stack}, "biased", pool, 128)


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_masks_follow_from_the_published_cka(task):
    mask, row = PUBLISHED[task]
    values = [float(v) for v in row.split()]
    assert select_layers(values, ratio=0.5, exclude=(0,)).mask == mask
    assert select_layers(values, ratio=0.5).mask == mask
    assert select_layers(scores(values, pool="cls", path="encoder.layer")).stacks == {"encoder.layer": mask}
    assert select_layers(scores(values, undefined={0})).mask == mask


@pytest.mark.parametrize(
    ("depth", "ratio", "n"),
    [(12, 0.5, 6), (28, 0.5, 14), (13, 0.5, 6), (12, 0.3, 3), (100, 0.29, 29), (12, 1.0, 12), (12, 1 / 12, 1)],
)
def test_the_number_of_layers_is_the_floor_of_the_ratio(depth, ratio, n):
    assert uniform({"layers": depth}, ratio=ratio).mask.count("1") == n
    assert select_layers([0.5] * depth, ratio=ratio).mask.count("1") == n


def test_ties_go_to_the_lower_index():
    assert select_layers([0.5, 0.5, 0.5, 0.5], count=2).layers == (0, 1)
    assert select_layers([0.9, 0.5, 0.7, 0.5], count=1).layers == (1,)


def test_a_cls_pooled_encoder_leaves_layer_0_out_and_a_decoder_does_not():
    values = [0.1, 0.2, 0.3, 0.4]
    assert select_layers(scores(values, pool="cls")).layers == (1, 2)
    assert select_layers(scores(values, pool="last")).layers == (0, 1)
    assert select_layers(scores(values, pool="cls"), exclude=()).layers == (0, 1)


def test_undefined_layers_are_left_out_unless_asked_for():
    values = scores([0.1, 0.2, 0.3, 0.4], undefined={0})
    assert select_layers(values).layers == (1, 2)
    assert select_layers(values, exclude=(), degenerate="exclude").layers == (1, 2)
    assert select_layers(values, degenerate="include").layers == (0, 1)


def test_layers_can_be_excluded_by_index():
    assert select_layers([0.1, 0.2, 0.3, 0.4], exclude=(0, 2)).layers == (1, 3)


def test_an_encoder_decoder_is_selected_stack_by_stack():
    both = {"encoder.block": [0.1, 0.9, 0.5, 0.2], "decoder.block": [0.9, 0.1]}
    where = select_layers(both, exclude={"encoder.block": (0,)})
    assert where.stacks == {"encoder.block": "0011", "decoder.block": "01"}
    with pytest.raises(ConfigError, match="several stacks"):
        where.mask  # noqa: B018


def test_the_choice_carries_its_scores_through_json():
    values = scores([0.1, float("nan"), 0.3, 0.4], undefined={1}, pool="mean")
    where = select_layers(values)
    again = Where.from_json(json.loads(json.dumps(where.to_json())))
    assert again == where
    assert again.method == "cka"
    back = LayerScores.from_json(again.scores)
    assert back.undefined == (False, True, False, False)
    assert math.isnan(back.cka[1])
    assert back.to_json() == values.to_json()


def test_shortcuts_refuse_several_stacks():
    two = LayerScores({"a": StackScores((0.1,), (False,)), "b": StackScores((0.2,), (False,))})
    for name in ("cka", "undefined"):
        with pytest.raises(ConfigError, match="several stacks"):
            getattr(two, name)


@pytest.mark.parametrize(
    ("settings", "key", "says"),
    [
        ({"ratio": 0}, "where.ratio", "above 0"),
        ({"ratio": -0.5}, "where.ratio", "above 0"),
        ({"ratio": 1.5}, "where.ratio", "at most 1"),
        ({"ratio": float("nan")}, "where.ratio", "above 0"),
        ({"ratio": "half"}, "where.ratio", "above 0"),
        ({"ratio": 0.3}, "where.ratio", "chooses none of 3 layers; at least 0.334 chooses one"),
        ({"count": 0}, "where.count", "from 1 to 3"),
        ({"count": 4}, "where.count", "from 1 to 3"),
        ({"count": 1.5}, "where.count", "whole number"),
        ({"count": 1, "ratio": 0.5}, "where.count", "ratio=0.5 is set too"),
    ],
)
def test_an_impossible_amount_is_refused_in_one_line(settings, key, says):
    for select in (lambda **kw: select_layers([0.1, 0.2, 0.3], **kw), lambda **kw: uniform({"layers": 3}, **kw)):
        with pytest.raises(ConfigError) as error:
            select(**settings)
        assert error.value.key == key
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def test_more_layers_than_candidates_is_refused():
    with pytest.raises(ConfigError, match=r"where\.ratio=1\.0: asks for 4 of 4 layers of layers, but layer 0 is"):
        select_layers(scores([0.1, 0.2, 0.3, 0.4], pool="cls"), ratio=1.0)
    with pytest.raises(ConfigError, match=r"where\.count=3.*layers 0, 1 are excluded, so at most 2"):
        select_layers(scores([0.1, 0.2, 0.3, 0.4], undefined={0, 1}), count=3)


def test_a_score_that_is_not_a_number_is_refused_unless_excluded():
    with pytest.raises(SelectionError, match="CKA of layer 1 is nan"):
        select_layers([0.1, float("nan"), 0.3, 0.2])
    assert select_layers([0.1, float("nan"), 0.3, 0.2], exclude=(1,)).layers == (0, 3)


@pytest.mark.parametrize("exclude", [(4,), (-1,), ("0",), "first", {"other": (0,)}])
def test_an_unknown_layer_to_exclude_is_refused(exclude):
    with pytest.raises(ConfigError, match=r"where\.exclude"):
        select_layers([0.1, 0.2, 0.3, 0.4], exclude=exclude)


# Controls


def test_uniform_spreads_the_layers_evenly():
    assert uniform({"layers": 12}).mask == "010101010101"
    assert uniform({"layers": 12}, count=3).mask == "001000100010"
    assert uniform({"layers": 5}, count=5).mask == "11111"
    assert all(uniform({"l": m}, count=n).mask.count("1") == n for m in range(1, 40) for n in range(1, m + 1))


def test_first_and_last_take_the_ends():
    assert first({"layers": 6}, ratio=0.4).mask == "110000"
    assert last({"layers": 6}, ratio=0.4).mask == "000011"


def test_random_is_the_same_for_the_same_seed():
    assert random({"layers": 24}, seed=3) == random({"layers": 24}, seed=3)
    assert len({random({"layers": 24}, seed=s).mask for s in range(8)}) > 1
    assert random({"layers": 24}, seed=3).mask.count("1") == 12


def test_controls_choose_in_every_stack():
    where = last({"encoder.block": 4, "decoder.block": 2})
    assert where.stacks == {"encoder.block": "0011", "decoder.block": "01"}


def test_a_mask_is_taken_as_given():
    assert from_mask({"layers": 4}, "0110").layers == (1, 2)
    where = from_mask({"encoder.block": 2, "decoder.block": 3}, {"decoder.block": "010"})
    assert where.stacks == {"decoder.block": "010"}


@pytest.mark.parametrize(
    ("depths", "mask", "says"),
    [
        ({"layers": 4}, "011", "3 characters, but layers has 4 layers"),
        ({"layers": 4}, "0121", "each 0 or 1"),
        ({"layers": 4}, "0000", "at least one layer"),
        ({"layers": 4}, 110, "put quotes around it"),
        ({"layers": 4}, {"layer": "0110"}, "Did you mean 'layers'?"),
        ({"encoder.block": 2, "decoder.block": 2}, "01", "give one mask for each of encoder.block, decoder.block"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(depths, mask, says):
    with pytest.raises(ConfigError) as error:
        from_mask(depths, mask)
    assert says in str(error.value)


def test_the_examples_in_the_docstrings_hold():
    for module in (trimtab.where, cka, controls, importance, plans):
        assert doctest.testmod(module).failed == 0
