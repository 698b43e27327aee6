"""kilter.interop.torch: the results, the state and the manners of torch.optim."""

import copy

import numpy as np
import pytest

from kilter import KilterError

torch = pytest.importorskip("torch", reason="torch is not installed")

from kilter.interop import torch as ours  # noqa: E402
from torchwalk import BOUND, assert_close, assert_same, gradients, optimizer, parameters, reference, rules, walk  # noqa: E402


@rules
def test_trajectories_are_those_of_torch(rule):
    bound = BOUND.get(rule, 1e-12)
    assert_close(walk(optimizer(rule, parameters()), 12), walk(reference(rule, parameters()), 12), bound)
    assert_close(
        walk(optimizer(rule, parameters(torch.float32)), 12), walk(reference(rule, parameters(torch.float32)), 12), 1e-4
    )


@rules
def test_schedulers_take_effect(rule):
    def run(make):
        one = make(rule, parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(one, 0.7)
        return walk(one, 8, after=scheduler.step)

    assert_close(run(optimizer), run(reference), BOUND.get(rule, 1e-12))


def test_one_cycle_moves_the_momentum_too():
    def run(kind):
        one = kind(parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(one, 0.5, total_steps=9)
        return walk(one, 8, after=scheduler.step), one.param_groups[0]["momentum"]

    (got, momentum), (want, same) = run(ours.SGD), run(torch.optim.SGD)
    assert momentum == same != 0.9
    assert_close(got, want)


def test_groups_have_options_of_their_own():
    def run(kind):
        a, b, *rest = parameters()
        one = kind(
            [{"params": [a, b], "lr": 0.5}, {"params": rest, "weight_decay": 0.3}],
            lr=torch.tensor(0.1, dtype=torch.float64),
        )
        found = walk(one, 3)
        one.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.float64))], "betas": (0.5, 0.6)})
        one.param_groups[1]["lr"] = 0.01
        params = [p for group in one.param_groups for p in group["params"]]
        for step in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.1 * step - 0.15)
            one.step()
        return found + [p.detach() for p in params]

    assert_close(run(ours.AdamW), run(torch.optim.AdamW))


@rules
def test_parameters_without_gradient_are_left_alone(rule):
    def run(make):
        params = parameters()
        one = make(rule, params)
        for step in range(9):
            one.zero_grad()
            for index, (p, g) in enumerate(zip(params, gradients(step), strict=True)):
                if step >= 6 or (step + index) % 3:
                    p.grad = g
            one.step()
        return [p.detach() for p in params]

    assert_close(run(optimizer), run(reference), BOUND.get(rule, 1e-12))


def test_no_gradients_at_all():
    params = parameters()
    one, before = ours.Adam(params), [p.detach().clone() for p in params]
    one.step()
    assert_same([p.detach() for p in params], before)
    assert one.state_dict()["state"] == {}


def test_parameters_stay_where_they_are():
    params = parameters(torch.float32)
    places = [p.data_ptr() for p in params]
    walk(ours.AdamW(params), 2)
    assert [p.data_ptr() for p in params] == places
    a, b = parameters()[::2]
    assert_same([a, b], [a.clone(), b.clone()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_16_bit_parameters_have_float32_masters(rule, dtype):
    master = [p.detach().to(dtype).float().requires_grad_() for p in parameters()]
    low = parameters(dtype)
    for step in range(20):
        for p, m, g in zip(low, master, gradients(step), strict=True):
            p.grad = g.to(dtype)
            m.grad = g.to(dtype).float()
        if step == 0:
            one, exact = optimizer(rule, low, lr=1e-3), optimizer(rule, master, lr=1e-3)
        one.step()
        exact.step()
    assert_same([p.detach() for p in low], [m.detach().to(dtype) for m in master])
    plain = walk(optimizer(rule, parameters(dtype), lr=1e-3, master_dtype=None), 20)
    assert any(not torch.equal(p, q) for p, q in zip(plain, low, strict=True))
    assert "master" in one.state_dict()["state"][0]


def test_state_dtype():
    one = ours.AdamW(parameters(torch.float32), state_dtype="bfloat16")
    walk(one, 3)
    state = one.state_dict()
    assert state["state"][0]["exp_avg"].dtype == torch.bfloat16
    again = ours.AdamW(parameters(torch.float32), state_dtype="bfloat16")
    again.load_state_dict(state)
    assert_same(again.state_dict(), state)


# ---------------------------------------------------------------- closure, autograd, memory


def test_closure_is_called_with_gradients_enabled():
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    one = ours.SGD([p], lr=0.1)

    def closure():
        one.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert one.step(closure).item() == 4.0
    assert p.item() == pytest.approx(2 - 0.1 * 4)
    assert one.step() is None


def test_training_a_module_as_torch_does():
    def run(kind):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
        x, y = torch.randn(32, 4, dtype=torch.float64), torch.randint(0, 2, (32,))
        one = kind(model.named_parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(10):
            one.zero_grad()
            scaler.scale(torch.nn.functional.cross_entropy(model(x), y)).backward()
            scaler.unscale_(one)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(one)
            scaler.update()
        return [p.detach() for p in model.parameters()]

    assert_close(run(ours.AdamW), run(torch.optim.AdamW))


def test_autograd_notices_the_change():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p**2).sum()
    p.grad = torch.ones(3)
    ours.SGD([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_any_layout():
    p, q = (torch.nn.Parameter(torch.ones(4, 6, dtype=torch.float64)) for _ in range(2))
    g = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    p.grad, q.grad = g.T, g.T.contiguous()
    ours.Adam([p], lr=0.1).step()
    ours.Adam([q], lr=0.1).step()
    assert torch.equal(p, q)


def test_parameters_that_move_take_their_state_along():
    params, moved = parameters(), parameters()
    one, other = ours.AdamW(params), ours.AdamW(moved)
    walk(one, 3)
    walk(other, 3)
    for p in moved:
        p.data = p.data.clone()
    assert_same(walk(other, 3, 3), walk(one, 3, 3))


# ---------------------------------------------------------------- mistakes


def sparse():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    return ours.SGD(table.parameters()).step()


def with_gradient(kind, p, grad):
    one = kind([p])
    p.grad = grad
    return one.step()


def flat(*shape):
    return torch.nn.Parameter(torch.ones(*shape))


def both_ways():
    a, b = flat(2), flat(2)
    a.grad = b.grad = torch.ones(2)
    return ours.SGD([{"params": [a]}, {"params": [b], "maximize": True}]).step()


def momentum_from_nothing():
    a = flat(2)
    one = ours.SGD([a])
    a.grad = torch.ones(2)
    one.param_groups[0]["momentum"] = 0.9
    return one.step()


STRIDED = torch.ones(4, 6).T
BAD = {
    "sparse": (sparse, r"^grads\[0.0\]: expected a dense tensor, got"),
    "strided": (lambda: ours.Adam([torch.nn.Parameter(STRIDED)]), r"^params\[0.0\]: expected a C-contiguous"),
    "named": (lambda: ours.Adam([("w", torch.nn.Parameter(STRIDED))]), r"^params\[w\]: expected a C-contiguous"),
    "meta": (
        lambda: ours.Adam([torch.nn.Parameter(torch.ones(2, device="meta"))]),
        r"^params\[0.0\]: expected a CPU tensor, got one on meta",
    ),
    "complex": (lambda: ours.Adam([torch.nn.Parameter(torch.ones(2) * 1j)]), r"^params\[0.0\]: expected dtype"),
    "float8": (
        lambda: ours.Adam([torch.nn.Parameter(torch.ones(2).to(torch.float8_e5m2))]),
        r"^params\[0.0\]: expected a tensor that NumPy",
    ),
    "overlap": (
        lambda: ours.Adam([torch.nn.Parameter(m) for m in (STRIDED.T, STRIDED.T[1:])]),
        r"^params\[0.1\]: expected memory of its own",
    ),
    "lr": (lambda: ours.Adam([flat(2)], lr=-1.0), "^lr: expected"),
    "betas": (lambda: ours.Adam([flat(2)], betas=(0.9, 1.0)), r"^betas\[1\]: expected"),
    "nesterov": (lambda: ours.SGD([flat(2)], nesterov=True), "^nesterov: expected"),
    "maximize": (both_ways, "^maximize: expected the same in all groups"),
    "momentum": (momentum_from_nothing, r"^groups\[0\]: expected options that need the state of construction"),
    "add": (
        lambda: ours.Adam([flat(2)]).add_param_group({"params": [torch.nn.Parameter(STRIDED)]}),
        r"^params\[1.0\]: expected a C-contiguous",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case):
    call, message = BAD[case]
    with pytest.raises(KilterError, match=message):
        call()


def test_a_refused_step_changes_nothing():
    params = parameters()
    one = ours.AdamW(params)
    walk(one, 2)
    before, kept = copy.deepcopy(one.state_dict()), [p.detach().clone() for p in params]
    params[2].grad = torch.ones(7, dtype=torch.float64).to_sparse()
    with pytest.raises(KilterError, match=r"^grads\[0.2\]"):
        one.step()
    assert_same([p.detach() for p in params], kept)
    assert_same(one.state_dict(), before)


def test_lion():
    from kilter.optim import Lion

    params = parameters()
    arrays = [p.detach().numpy().copy() for p in params]
    plain = Lion(arrays, lr=0.01, weight_decay=0.1)
    got = walk(ours.Lion(params, lr=0.01, weight_decay=0.1), 5)
    for step in range(5):
        plain.step([g.numpy() for g in gradients(step)])
    for a, b in zip(got, arrays, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)
