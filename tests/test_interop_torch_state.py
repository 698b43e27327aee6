"""kilter.interop.torch: state dicts that go to torch.optim and back, and runs that are resumed."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from kilter.interop import torch as ours  # noqa: E402
from torchwalk import BOUND, assert_close, assert_same, optimizer, parameters, reference, rules, walk  # noqa: E402


@rules
@pytest.mark.parametrize("saved", ["ours", "torch"])
@pytest.mark.parametrize("loaded", ["ours", "torch"])
def test_state_goes_both_ways(rule, saved, loaded):
    makers = {"ours": optimizer, "torch": reference}
    params, bound = parameters(), BOUND.get(rule, 1e-12)
    first = makers[saved](rule, params)
    walk(first, 4)
    second = makers[loaded](rule, params)
    second.load_state_dict(first.state_dict())
    got = walk(second, 4, 4)
    assert_close(got, walk(reference(rule, parameters()), 8), bound)


@rules
def test_state_has_the_entries_of_torch(rule):
    one, other = optimizer(rule, parameters()), reference(rule, parameters())
    walk(one, 3)
    walk(other, 3)
    got, want = one.state_dict(), other.state_dict()
    assert got["state"].keys() == want["state"].keys()
    for number, entries in want["state"].items():
        for key, value in entries.items():
            mine = got["state"][number][key]
            if isinstance(value, torch.Tensor):
                bound = BOUND.get(rule, 1e-12)
                assert (mine - value).abs().max() <= bound if value.numel() else True
    for mine, group in zip(got["param_groups"], want["param_groups"], strict=True):
        assert {key: group[key] for key in mine} == mine


@rules
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "deepcopy", "pickle"])
def test_a_resumed_run_is_the_uninterrupted_one(rule, dtype, way):
    whole = walk(optimizer(rule, parameters(dtype)), 9)
    params = parameters(dtype)
    one = optimizer(rule, params)
    walk(one, 5)
    if way == "deepcopy":
        again = copy.deepcopy(one)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(one))
    else:
        state = one.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        again = optimizer(rule, [torch.nn.Parameter(p.detach().clone()) for p in params], lr=7.0)
        again.load_state_dict(state)
        assert_same(again.state_dict(), one.state_dict())
    before = one.state_dict()
    assert_same(walk(again, 4, 5), whole)
    assert_same(one.state_dict(), before)  # the two are apart


def test_a_state_dict_is_a_copy():
    one = ours.Adam(parameters())
    walk(one, 2)
    state = one.state_dict()
    kept = copy.deepcopy(state)
    walk(one, 2, 2)
    assert_same(state, kept)
    assert state["state"][0]["step"].item() == 2


def test_loading_between_steps_and_after_a_new_group():
    params = parameters()
    one = ours.Adam(params[:2])
    for p in params:
        p.grad = torch.ones_like(p)
    one.step()
    one.add_param_group({"params": params[2:]})
    assert set(one.state_dict()["state"]) == {0, 1}
    one.step()
    steps = {number: int(entries["step"]) for number, entries in one.state_dict()["state"].items()}
    assert steps == {0: 2, 1: 2, 2: 1, 3: 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", ["momentum", "adamw", "adamax", "nadam"])
def test_there_and_back_again(rule, dtype):
    """What torch carries along without knowing it is not taken for new."""
    params = parameters(dtype)
    first = optimizer(rule, params, lr=1e-2)
    walk(first, 3)
    second = reference(rule, params, lr=1e-2)
    second.load_state_dict(first.state_dict())
    walk(second, 3, 3)
    third = optimizer(rule, params, lr=1e-2)
    third.load_state_dict(second.state_dict())
    got = walk(third, 3, 6)
    want = walk(reference(rule, parameters(torch.float64), lr=1e-2), 9)
    assert_close([p.double() for p in got], want, 0.05 if dtype == torch.bfloat16 else BOUND.get(rule, 1e-12))


def test_betas_that_move_are_part_of_the_state():
    def cycled(one):
        one.param_groups[0]["betas"] = (0.5 + 0.4 / (1 + one.param_groups[0].setdefault("n", 0)), 0.99)
        one.param_groups[0]["n"] += 1

    whole = ours.Adam(parameters())
    want = walk(whole, 8, after=lambda: cycled(whole))
    params = parameters()
    first, second = ours.Adam(params), ours.Adam(params)
    walk(first, 4, after=lambda: cycled(first))
    second.load_state_dict(first.state_dict())
    assert_same(walk(second, 4, 4, after=lambda: cycled(second)), want)


def test_what_others_write_into_16_bit_parameters_is_taken_over():
    whole, changed = parameters(torch.bfloat16), parameters(torch.bfloat16)
    one, other = ours.SGD(whole, lr=1e-3), ours.SGD(changed, lr=1e-3)
    walk(one, 3)
    walk(other, 3)
    with torch.no_grad():
        changed[0][1] = 100.0
        changed[2].mul_(1.0)  # no change
    walk(one, 3, 3)
    walk(other, 3, 3)
    assert (changed[0][1] > 90).all()
    assert_same([changed[0][0], *changed[1:]], [whole[0][0], *whole[1:]])


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_models_and_optimizers_are_loaded_in_any_order(order):
    params = parameters(torch.bfloat16)
    one = ours.AdamW(params, lr=1e-2)
    walk(one, 4)
    saved, state = [p.detach().clone() for p in params], one.state_dict()
    fresh = parameters(torch.bfloat16, seed=9)
    again = ours.AdamW(fresh)

    def load_model():
        with torch.no_grad():
            for p, value in zip(fresh, saved, strict=True):
                p.copy_(value)

    for load in [load_model, lambda: again.load_state_dict(state)][:: 1 if order == "model first" else -1]:
        load()
    assert_same(walk(again, 3, 4), walk(one, 3, 4))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda s: s["state"][0].pop("exp_avg_sq"), r"^state\[0.0\]: expected the entry exp_avg_sq"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3)), r"^state\[0.0\].exp_avg: expected shape \(5, 3\)"),
        (lambda s: s["param_groups"][0].update(decoupled_weight_decay=False), "^decoupled_weight_decay: expected"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "^lr: expected"),
        (lambda s: s["param_groups"].append({"params": []}), "different number of parameter groups"),
    ],
)
def test_a_refused_state_changes_nothing(change, error):
    one = ours.AdamW(parameters())
    walk(one, 3)
    before = copy.deepcopy(one.state_dict())
    state = copy.deepcopy(before)
    change(state)
    with pytest.raises(ValueError, match=error):
        one.load_state_dict(state)
    assert_same(one.state_dict(), before)
    assert_same(walk(one, 2, 3), walk(ours.AdamW(parameters()), 5))
