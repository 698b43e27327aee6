"""kilter.optim: options of the rules, and groups that were edited between steps, into sense and nonsense."""

import numpy as np
import pytest

from kilter import KilterError
from kilter.optim import SGD, Adadelta, Adagrad, Adam, AdamW, Lion, NAdam, RMSprop
from optimizers import KINDS, RULES, kinds, on, read, rules
from support import BFLOAT16, FLOAT32, FLOAT64, copied, plain, refused, same_bits

NAN = float("nan")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((Adagrad, "lr_decay", v) for v in (NAN, -0.1, lambda k: 0.1)),
        *((Adagrad, "initial_accumulator_value", v) for v in (NAN, -0.1)),
        *((Adagrad, "lagged", v) for v in (1, "yes", None)),
        *((kind, "eps", v) for kind in (Adagrad, RMSprop, Adadelta, NAdam) for v in (NAN, -1e-8, lambda k: 1e-8)),
        *((RMSprop, "alpha", v) for v in (NAN, -0.1, 1.1)),
        *((RMSprop, "momentum", v) for v in (NAN, -0.1, 1.1)),
        (RMSprop, "centered", 1),
        *((kind, "window", v) for kind in (RMSprop, Adadelta) for v in (0, -3, 2.0, True, "3")),
        *((Adadelta, "rho", v) for v in (NAN, -0.1, 1.1)),
        (NAdam, "momentum_decay", -1.0),
        *((Lion, "betas", v) for v in ((0.9, 1.0), (NAN, 0.9), 0.9)),
        (Adam, "amsgrad", 1),
        *((SGD, name, 1) for name in ("nesterov", "lr_inside")),
        *((kind, "state_dtype", v) for kind in KINDS.values() for v in ("float16", "float64", "int8", 5)),
        *((kind, "skip_nonfinite", "yes") for kind in KINDS.values()),
    ],
)
def test_options_are_checked(kind, name, value):
    with refused(name):
        kind([np.ones(3, FLOAT32)], **{name: value})


def test_options_that_exclude_each_other():
    p = np.ones(3)
    for kind, options, match in (
        (Adagrad, {"lagged": True}, "lagged.*initial_accumulator_value"),  # the first step would explode
        (RMSprop, {"centered": True, "window": 3}, "centered"),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.5}, "nesterov"),
        (SGD, {"nesterov": True}, "nesterov"),
        (Adam, {"state_dtype": "float32"}, "state_dtype"),  # of float64 parameters
    ):
        with refused(match, p):
            kind([p], **options)


def test_state_dtypes_by_name_and_as_dtypes():
    for dtype in (BFLOAT16, "bfloat16", BFLOAT16.type):
        opt = Adam([np.ones(3, FLOAT32)], state_dtype=dtype)
        assert opt.state_dict()["state.0.m"].dtype == BFLOAT16


# --------------------------------------------------------------------------- edited groups


def stepped(kind, options=()):
    ps = {"w": np.ones(3, FLOAT32), "b": np.full(2, 2, FLOAT32)}
    opt = kind(ps, **dict(options))
    opt.step(copied(ps))
    return ps, opt


def deleted(group):
    del group["lr"]


NONSENSE = {
    "deleted key": deleted,
    "unknown key": lambda group: group.update(speed=1.0),
    "deleted params": lambda group: group.pop("params"),
    "other params": lambda group: group.update(params={"w": np.ones(3, FLOAT32)}),
    "lr text": lambda group: group.update(lr="fast"),
    "lr nan": lambda group: group.update(lr=NAN),
    "lr none": lambda group: group.update(lr=None),
    "lr array": lambda group: group.update(lr=np.ones(3)),
    "lr of lr": lambda group: group.update(lr=lambda call: lambda: 0.1),
}


@pytest.mark.parametrize("edit", NONSENSE.values(), ids=NONSENSE)
@kinds
def test_nonsense_is_refused_at_the_next_step(kind, edit):
    ps, opt = stepped(kind)
    edit(opt.groups[0])
    with refused("groups|lr", ps, opt._buckets[0].state):
        opt.step(copied(ps))
    assert opt.calls == 1


@pytest.mark.parametrize("edit", [edit for name, edit in NONSENSE.items() if name != "lr of lr"])
def test_nonsense_is_refused_by_what_lays_out_state(edit):
    ps, opt = stepped(Adam)
    state = opt.state_dict()
    edit(opt.groups[0])
    for change in (lambda: opt.freeze("w"), lambda: opt.add_params({"new": np.ones(3, FLOAT32)})):
        with refused("groups|lr", ps, opt._buckets[0].state):
            change()
    if opt.groups[0].keys() != {"params", *opt._defaults}:
        with refused("groups", ps, opt._buckets[0].state):
            opt.load_state_dict(state)


@pytest.mark.parametrize(
    "edit",
    [lambda g: g.clear(), lambda g: g.append(dict(g[0])), lambda g: g.__setitem__(0, None)],
    ids=["cleared", "appended", "none"],
)
def test_other_groups_are_refused(edit):
    ps, opt = stepped(Adam)
    edit(opt.groups)
    with refused("groups", ps):
        opt.step(copied(ps))
    opt.groups = None
    with refused("groups", ps):
        opt.step(copied(ps))


def test_parameters_cannot_be_slipped_into_a_group():
    _, opt = stepped(Adam)
    with pytest.raises(TypeError):
        opt.groups[0]["params"]["new"] = np.ones(3)


@pytest.mark.parametrize(
    ("kind", "options", "name", "value"),
    [
        (Adam, {}, "amsgrad", True),
        (AdamW, {"amsgrad": True}, "amsgrad", False),
        (SGD, {}, "momentum", 0.9),
        (RMSprop, {}, "momentum", 0.9),
        (RMSprop, {}, "centered", True),
        (RMSprop, {"window": 3}, "window", 4),
        (Adadelta, {}, "window", 3),
        (Adagrad, {}, "initial_accumulator_value", 0.1),
        (AdamW, {}, "decay", "both"),
        (SGD, {"momentum": 0.9}, "nesterov", "yes"),
    ],
)
def test_options_whose_state_is_missing_are_refused(kind, options, name, value):
    ps, opt = stepped(kind, options)
    opt.groups[0][name] = value
    with refused("groups|decay|nesterov", ps, opt):
        opt.step(copied(ps))
    assert opt.calls == 1


@pytest.mark.parametrize(("kind", "options"), [(SGD, {}), (RMSprop, {}), (RMSprop, {"window": 3})])
def test_a_momentum_may_be_set_to_zero(backend, kind, options):
    p, plainly = on(backend, [np.ones(3), np.ones(3)])
    opt, other = kind([p], 0.1, momentum=0.9, **options), kind([plainly], 0.1, **options)
    opt.groups[0]["momentum"] = 0.0
    for g in (0.5, -1.0, 2.0):
        g = backend.array(np.full(3, g))
        opt.step([g])
        other.step([g])
    assert same_bits(*read(backend, [p, plainly]))


def test_nesterov_with_a_momentum_that_starts_at_zero():
    p = np.ones(2)
    SGD([p], 0.1, momentum=lambda k: 0.1 * k, nesterov=True).step([np.ones(2)])
    np.testing.assert_allclose(p, 0.9)


def test_options_may_be_edited_into_sense():
    ps, opt = stepped(AdamW)
    opt.groups[0].update(lr=lambda k: 0.5, weight_decay=0.0, betas=[0.5, 0.9], eps=1e-3, decay="independent")
    opt.step(copied(ps))
    assert opt.calls == 2


# --------------------------------------------------------------------------- windows


@pytest.mark.parametrize("kind", [RMSprop, Adadelta])
def test_windows_of_parameters_that_join_freeze_and_thaw(backend, rng, kind):
    """Each parameter's window has its own age, whatever the others do."""
    start, grads = rng.normal(size=(3, 5)), rng.normal(size=(12, 3, 5))
    together, alone = on(backend, list(start)), on(backend, list(start))
    opt = kind({"a": together[0], "b": together[1]}, 0.1, window=4)
    single = [kind({"x": p}, 0.1, window=4) for p in alone]
    for call, g in enumerate(grads):
        if call == 2:
            opt.freeze("a")
        if call == 3:
            opt.add_params({"c": together[2]})
        if call == 7:
            opt.thaw("a")
        active = [not 2 <= call < 7, True, call >= 3]
        opt.step({name: backend.array(g[i]) for i, name in enumerate("abc") if active[i]})
        for i in range(3):
            if active[i]:
                single[i].step({"x": backend.array(g[i])})
    assert all(map(same_bits, read(backend, together), read(backend, alone)))


def test_a_window_keeps_its_last_squares(backend, rng):
    grads = rng.normal(size=(6, 2, 3))
    opt = RMSprop(on(backend, {"w": np.zeros((2, 3)), "b": np.zeros(())}), window=4)
    for g in grads:
        opt.step(on(backend, {"w": g, "b": np.array(g[0, 0])}))
    squares = opt.state_dict()["state.w.squares"]
    assert squares.shape == (3, 2, 3) and opt.state_dict()["state.b.squares"].shape == (3,)
    np.testing.assert_allclose(np.sort(squares, 0), np.sort(grads[-3:] ** 2, 0))


@rules
def test_empty_parameters(backend, rule):
    kind, options, _ = RULES[rule]
    ps = [np.empty(0), np.ones(3), np.empty((2, 0))]
    opt = kind(on(backend, ps), **options)
    for _ in range(3):
        opt.step(on(backend, ps))
    assert opt.applied == 3


def test_no_active_parameters(backend):
    p = backend.array(np.ones(3))
    opt = Adam({"w": p}, skip_nonfinite=True, clip_norm=1.0)
    opt.freeze("w")
    report = opt.step({})
    assert (*report,) == (1, 1, 0.0, False) and (p == 1).all()


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
def test_lagged_state_starts_where_it_is_told(backend, dtype):
    p = backend.array(np.zeros(4, dtype))
    opt = Adagrad([p], 1.0, initial_accumulator_value=4.0, lagged=True, eps=0.0)
    opt.step([backend.array(np.full(4, 3, dtype))])
    assert (p == -1.5).all() and (opt.state_dict()["state.0.sum"] == 13).all()


@rules
def test_a_state_of_another_dtype_is_refused(rule):
    kind, options, _ = RULES[rule]
    ps = [np.ones(3, FLOAT32)]
    opt, other = kind(ps, **options), kind([np.ones(3, FLOAT32)], **options, state_dtype="bfloat16")
    for one in (opt, other):
        one.step([np.ones(3, FLOAT32)])
    state, before = other.state_dict(), plain(opt.state_dict())
    if any(isinstance(v, np.ndarray) for v in state.values()):
        with pytest.raises(KilterError, match="bfloat16"):
            opt.load_state_dict(state)
    assert plain(opt.state_dict()) == before
