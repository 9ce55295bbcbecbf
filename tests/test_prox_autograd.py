"""The derivatives of the proxes and norms against finite differences and implicit ones; broken twins must fail."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import Function, forward_ad, gradcheck, gradgradcheck

from tying.errors import PenaltyError
from tying.penalties import OWL, Constant, GrOWL, Oscar, Pld, Ramp, Spike
from tying.penalties.prox import owl_dual_norm, owl_norm, prox_growl, prox_owl

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")  # torch's own, in forward mode

SEQUENCES = [
    Constant(0.3),
    Constant(0.0),
    Oscar(0.1, 0.2),
    Oscar(0.0, 0.3),
    Ramp(3.0),
    Pld(0.2, 0.1, 0.5),
    Spike(0.2, 1),
]
STEPS = [0.0, 0.3, 1.0, 5.0]


def vectors() -> list[Tensor]:
    """Away from kinks with probability one."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (2,), (7,), (30,), (3, 6), (2, 2, 4), (0,), (0, 3), (2, 0)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def law_of_derivative(prox) -> None:
    """Finite differences, forward and backward, first and second order."""
    for v in vectors():
        for sequence in SEQUENCES:
            for step in STEPS:
                v = v.detach().clone().requires_grad_()

                def run(v, sequence=sequence, step=step):
                    return prox(v, sequence, step)

                assert gradcheck(run, v, check_forward_ad=v.numel() > 0, eps=1e-7, atol=1e-5), (v, sequence, step)
                assert gradgradcheck(run, v, eps=1e-7, atol=1e-5), (v, sequence, step)


def test_the_derivative_of_the_owl_prox_is_that_of_finite_differences():
    law_of_derivative(prox_owl)


def straight_through(change):
    """A prox whose derivative is that of something else."""

    class Twin(Function):
        @staticmethod
        def forward(ctx, v, sequence, step):
            x = prox_owl(v, sequence, step)
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx, grad):
            return change(ctx.saved_tensors[0], grad), None, None

    return Twin.apply


def blocks_without_signs(x, grad):
    result = torch.zeros_like(grad)
    for size in x.abs().unique():
        same = (x.abs() == size) & (x != 0)
        result[same] = grad[same].mean()
    return result


@pytest.mark.parametrize(
    "change",
    [lambda x, g: g, lambda x, g: g * (x != 0), lambda x, g: g * x.abs() / (x.abs() + 1e-3), blocks_without_signs],
    ids=["identity", "support only", "reweighted", "no signs"],
)
def test_the_law_refuses_another_derivative(change):
    twin = straight_through(change)
    v = torch.tensor([3.0, -2.9, 0.5, 1.1, -0.1], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: prox_owl(v, Ramp(3.0), 0.4), v)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        gradcheck(lambda v: twin(v, Ramp(3.0), 0.4), v)


def test_the_jacobian_averages_within_blocks_with_signs():
    v = torch.tensor([-4.0, 1.0, 3.5, 0.1], dtype=torch.float64)
    found = torch.func.jacrev(lambda v: prox_owl(v, [2.0, 1.0, 0.5, 0.5]))(v)
    expected = torch.tensor([[0.5, 0, -0.5, 0], [0, 1, 0, 0], [-0.5, 0, 0.5, 0], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(found, prox_owl(v, [2.0, 1.0, 0.5, 0.5]).new_tensor(expected.tolist()))


def test_equal_numbers_are_averaged_only_where_the_weights_differ():
    """A lasso moves each by itself: the derivative at equal numbers is the identity there, and it is no kink."""
    v = torch.tensor([2.0, -2.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: prox_owl(v, Constant(0.5)), v)
    assert gradcheck(lambda v: prox_owl(v, Oscar(0.1, 0.5)), v)
    jacobian = torch.autograd.functional.jacobian(lambda v: prox_owl(v, Constant(0.5)), v)
    assert torch.equal(jacobian, torch.eye(3, dtype=torch.float64))


def test_without_a_penalty_the_derivative_is_the_identity_at_zero_too():
    zero = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for weights, step in ((Ramp(3.0), 0.0), (Constant(0.0), 1.0)):
        assert gradcheck(lambda v, w=weights, s=step: prox_owl(v, w, s), zero)
        assert gradcheck(lambda m, w=weights, s=step: prox_growl(m, w, s), zero.reshape(2, 2))
    one_zero = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda v: prox_owl(v, Oscar(0.0, 0.1)), one_zero)  # the last weight is 0


def law_of_small_numbers(prox, shape: tuple[int, ...], weights: tuple[float, ...], jacobian=None) -> int:
    """At small whole numbers, kinks left out: the Jacobian of finite differences. How many points that were."""
    found = 0
    size, step = int(np.prod(shape)), 2.0**-12
    directions = torch.cat([torch.eye(size), torch.randn(6, size, generator=torch.Generator().manual_seed(0))]).double()
    for numbers in product((0.0, 1.0, -3.0), repeat=size):
        v = torch.tensor(numbers, dtype=torch.float64).reshape(shape)

        def run(v):
            return prox(v.reshape(shape), weights).flatten()

        ahead = torch.stack([(run(v.flatten() + step * d) - run(v)) / step for d in directions])
        behind = torch.stack([(run(v) - run(v.flatten() - step * d)) / step for d in directions])
        slopes = (ahead + behind) / 2
        if (ahead - behind).abs().max() < 0.03 and (directions @ slopes[:size] - slopes).abs().max() < 0.03:
            found += 1
            exact = (jacobian or torch.func.jacrev)(run)(v.flatten())
            assert (exact - slopes[:size].T).abs().max() < 0.03, (numbers, weights)
    return found


SMALL_WEIGHTS = [w for n in (1, 2, 3) for w in product((0.0, 1.0, 3.0), repeat=n) if list(w) == sorted(w)[::-1]]


def test_the_derivative_is_right_wherever_there_is_one():
    """Zeros that meet no threshold too: they are free, unless something that becomes zero draws them along."""
    assert sum(law_of_small_numbers(prox_owl, (len(w),), w) for w in SMALL_WEIGHTS) > 100
    assert sum(law_of_small_numbers(prox_growl, (len(w), 1), w) for w in SMALL_WEIGHTS) > 100
    assert sum(law_of_small_numbers(prox_growl, (2, 2), w) for w in SMALL_WEIGHTS if len(w) == 2) > 100


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_the_law_of_small_numbers_refuses_zeros_that_are_always_free(shape):
    def free(run):
        def jacobian(v):
            found = torch.func.jacrev(run)(v)
            return torch.where((v == 0).diag(), 0.5, found)

        return jacobian

    with pytest.raises(AssertionError):
        law_of_small_numbers(prox_owl if len(shape) == 1 else prox_growl, shape, (3.0, 0.0), free)


# Groups.


def matrices() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in [(1, 1), (5, 3), (8, 1), (0, 3), (3, 0)]]
    zeros = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    zeros[[1, 4]] = 0.0
    return [*made, zeros]


def law_of_group_derivative(prox) -> None:
    for matrix in matrices():
        for sequence in (Ramp(3.0), Constant(0.2), Oscar(0.1, 0.2)):
            for step in (0.0, 0.2, 1.0, 9.0):
                if step == 0.0 and not matrix.all():
                    continue  # see the test at zero
                matrix = matrix.detach().clone().requires_grad_()

                def run(m, sequence=sequence, step=step):
                    return prox(m, sequence, step)

                assert gradcheck(run, matrix, check_forward_ad=matrix.numel() > 0, eps=1e-7, atol=1e-5)
                if matrix.all():
                    assert gradgradcheck(run, matrix, eps=1e-7, atol=1e-4)


def test_the_derivative_of_the_growl_prox_is_that_of_finite_differences():
    law_of_group_derivative(prox_growl)


def constant_factors(matrix, sequence, step):
    norms = matrix.norm(dim=1)
    return (
        matrix * (prox_growl(matrix.detach(), sequence, step).norm(dim=1) / norms.clamp(min=1e-300)).detach()[:, None]
    )


def test_the_law_of_groups_refuses_constant_factors():
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        law_of_group_derivative(constant_factors)


# What else is asked of a function of tensors.


def test_no_gradient_is_asked_for_and_none_is_kept():
    v = torch.randn(50, requires_grad=True)
    matrix = torch.randn(5, 4, requires_grad=True)
    with torch.no_grad():
        assert not prox_owl(v, Ramp(3.0)).requires_grad
        assert not prox_growl(matrix, Ramp(3.0)).requires_grad
    assert prox_owl(v, Ramp(3.0)).requires_grad
    assert not prox_owl(v.detach(), Ramp(3.0)).requires_grad
    assert not OWL(1.0).prox(matrix, 0.1).requires_grad
    assert not GrOWL(1.0).prox(matrix, 0.1).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_result_does_not_depend_on_whether_a_gradient_is_wanted(dtype):
    for shape in ((40,), (3, 40), (2000,)):
        v = torch.randn(shape, dtype=dtype)
        assert torch.equal(prox_owl(v.requires_grad_(), Ramp(3.0), 0.2).detach(), prox_owl(v.detach(), Ramp(3.0), 0.2))
    matrix = torch.randn(40, 6, dtype=dtype)
    matrix[3] = 0.0
    found = prox_growl(matrix.requires_grad_(), Ramp(3.0), 0.2)
    assert torch.equal(found.detach(), prox_growl(matrix.detach(), Ramp(3.0), 0.2))
    assert found.dtype == dtype
    found.sum().backward()
    assert matrix.grad is not None
    assert matrix.grad.dtype == dtype


def test_function_transforms():
    batch = torch.randn(4, 9, dtype=torch.float64)

    def prox(v: Tensor) -> Tensor:
        return prox_owl(v, Ramp(3.0), 0.3)

    assert torch.equal(torch.func.vmap(prox)(batch), prox(batch))
    assert torch.equal(torch.func.vmap(prox, in_dims=1, out_dims=1)(batch.T), prox(batch).T)
    backward, forward = torch.func.jacrev(prox)(batch[0]), torch.func.jacfwd(prox)(batch[0])
    torch.testing.assert_close(backward, forward, rtol=0, atol=1e-16)
    torch.testing.assert_close(backward, backward.T, rtol=0, atol=1e-16)
    each = torch.func.vmap(torch.func.grad(lambda v: prox(v).square().sum()))(batch)
    expected = [torch.func.grad(lambda v: prox(v).square().sum())(v) for v in batch]
    torch.testing.assert_close(each, torch.stack(expected), rtol=0, atol=1e-15)

    stack = torch.randn(3, 5, 2, dtype=torch.float64)
    grouped = torch.func.vmap(lambda m: prox_growl(m, Ramp(3.0), 0.2))(stack)
    torch.testing.assert_close(grouped, torch.stack([prox_growl(m, Ramp(3.0), 0.2) for m in stack]), rtol=0, atol=1e-15)
    loss = torch.func.grad(lambda m: prox_growl(m, Ramp(3.0), 0.2).square().sum())
    torch.testing.assert_close(torch.func.vmap(loss)(stack), torch.stack([loss(m) for m in stack]), rtol=0, atol=1e-14)


def test_forward_mode_by_hand():
    v, direction = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(prox_owl(forward_ad.make_dual(v, direction), Ramp(3.0), 0.3)).tangent
    jacobian = torch.func.jacrev(lambda v: prox_owl(v, Ramp(3.0), 0.3))(v)
    torch.testing.assert_close(tangent, jacobian @ direction)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("function", [prox_owl, owl_norm, owl_dual_norm, lambda v, w: prox_growl(v.reshape(3, 3), w)])
def test_a_compiled_caller_gets_the_same(function):
    def loss(v: Tensor) -> Tensor:
        return (function(v * 2.0, Ramp(3.0)) + 1.0).square().sum()

    v, w = (torch.arange(9.0, requires_grad=True) for _ in range(2))
    loss(v).backward()
    torch.compile(loss, backend="eager")(w).backward()
    torch.testing.assert_close(v.grad, w.grad, rtol=0, atol=0)


def test_what_is_not_finite_is_named_with_gradients_too():
    bad = torch.tensor([[1.0, torch.nan], [1.0, 1.0]], requires_grad=True)
    with pytest.raises(PenaltyError, match=r"NaN or infinity in 1 of 4, first at entry 1"):
        prox_owl(bad, Ramp(3.0))
    with pytest.raises(PenaltyError, match=r"NaN or infinity in 1 of 2, first at group 0"):
        prox_growl(bad, Ramp(3.0))
    for norm in (owl_norm, owl_dual_norm):
        with pytest.raises(
            PenaltyError, match=r"[xu]: expected finite numbers, got NaN or infinity in 1 of 4, first at"
        ):
            norm(bad, Ramp(3.0))
        with pytest.raises(PenaltyError, match=r"NaN or infinity in 1 of 4, first at entry 1"):
            norm(bad.detach(), Ramp(3.0))
    with pytest.raises(PenaltyError, match="weights: expected numbers"):
        prox_owl(torch.ones(2), torch.ones(2, requires_grad=True))
    with pytest.raises(PenaltyError, match="step: expected a finite number"):
        prox_owl(torch.ones(2), Ramp(3.0), torch.tensor(1.0, requires_grad=True))


# A solver of somebody else's, through which a strength is learned.


def test_unrolled_iterations_have_the_derivative_of_the_solution():
    """∂x*/∂y by implicit differentiation on the blocks of the solution, against backward through the iterations."""
    rng = np.random.default_rng(0)
    A = torch.from_numpy(rng.standard_normal((12, 6)))
    y = torch.from_numpy(rng.standard_normal(12)).requires_grad_()
    step = float(1 / torch.linalg.matrix_norm(A, 2) ** 2)
    x = torch.zeros(6, dtype=torch.float64)
    for _ in range(3000):
        x = prox_owl(x - step * (A.T @ (A @ x - y)), Ramp(3.0), 0.4 * step)
    direction = torch.from_numpy(rng.standard_normal(6))
    (found,) = torch.autograd.grad(x @ direction, y)
    sizes = x.detach().abs().unique()
    pattern = torch.stack([x.detach().sign() * (x.detach().abs() == s) for s in sizes[sizes > 0]], dim=1)
    reduced = A @ pattern
    expected = reduced @ torch.linalg.solve(reduced.T @ reduced, pattern.T @ direction)
    assert 0 < pattern.shape[1] < 6
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


# Norms.


def law_of_norm_derivative(norm) -> None:
    for x in vectors():
        if x.shape[-1]:
            assert gradcheck(lambda x: norm(x, Ramp(3.0)), x.clone().requires_grad_())


def test_norms_are_differentiable_and_batched():
    law_of_norm_derivative(owl_norm)
    law_of_norm_derivative(owl_dual_norm)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        law_of_norm_derivative(lambda x, w: owl_norm(x.detach(), w) + 0.0 * x.sum(dim=-1))
    batch = torch.randn(3, 4, 5)
    for norm in (owl_norm, owl_dual_norm):
        found = norm(batch, Ramp(3.0))
        assert found.shape == (3, 4)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found[1, 2], norm(batch[1, 2], Ramp(3.0)), rtol=1e-15, atol=0)


def test_norms_inside_function_transforms():
    batch = torch.randn(4, 9, dtype=torch.float64)
    for norm in (owl_norm, owl_dual_norm):
        expected = norm(batch, Ramp(3.0))
        torch.testing.assert_close(
            torch.func.vmap(lambda x, f=norm: f(x, Ramp(3.0)))(batch), expected, rtol=1e-15, atol=0
        )
        each = torch.func.vmap(torch.func.grad(lambda x, f=norm: f(x, Ramp(3.0))))(batch)
        ours = batch.clone().requires_grad_()
        norm(ours, Ramp(3.0)).sum().backward()
        torch.testing.assert_close(each, ours.grad, rtol=1e-15, atol=0)
        forward = torch.func.jacfwd(lambda x, f=norm: f(x, Ramp(3.0)))(batch[0])
        torch.testing.assert_close(forward, each[0], rtol=1e-15, atol=0)
        with pytest.raises(PenaltyError, match="expected finite numbers"):
            torch.func.vmap(lambda x, f=norm: f(x, Ramp(3.0)))(batch / 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_do_not_depend_on_whether_a_gradient_is_wanted(dtype):
    for x in (torch.randn(40, dtype=dtype), torch.randn(30, 3, dtype=dtype).T, torch.randn(2, 0, dtype=dtype)):
        for norm in (owl_norm, owl_dual_norm):
            wanted = norm(x.clone().requires_grad_(), Ramp(3.0))
            assert torch.equal(norm(x, Ramp(3.0)), wanted.detach())


def test_without_a_penalty_the_dual_norm_has_no_slope_at_zero():
    for given in (torch.zeros(2), torch.tensor([0.0, 1.0])):
        u = given.clone().requires_grad_()
        owl_dual_norm(u, [0.0, 0.0]).backward()
        assert torch.equal(u.grad, torch.zeros(2))


def test_numpy_may_be_told_to_raise():
    """What underflows on the way to the result is zero there."""
    tiny = torch.tensor([3e-38, 1e-38, 3e-38])
    expected = prox_owl(tiny, [2.9999999e-38, 1e-39, 0.0])
    matrix = torch.tensor([[1e-308], [3e-308]], dtype=torch.float64)
    grouped = prox_growl(matrix, [2e-308, 1e-309])
    with np.errstate(all="raise"):
        assert torch.equal(prox_owl(tiny, [2.9999999e-38, 1e-39, 0.0]), expected)
        assert torch.equal(prox_owl(tiny.requires_grad_(), [2.9999999e-38, 1e-39, 0.0]).detach(), expected)
        assert torch.equal(prox_growl(matrix, [2e-308, 1e-309]), grouped)


def test_an_error_of_torch_itself_is_not_swallowed(monkeypatch):
    def full(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("tying.penalties.prox.finite_norms", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        prox_growl(torch.ones(2, 2), Ramp(3.0))


@pytest.mark.parametrize("hidden", ["forward_ad._current_level", "prox._innermost_transform"])
def test_where_torch_hides_what_is_at_work_derivatives_are_right(hidden, monkeypatch):
    from tying.penalties import prox

    if hidden.startswith("prox"):
        monkeypatch.setattr(prox, "_innermost_transform", None)
    else:
        monkeypatch.setattr(prox, "forward_ad", object())
    assert prox._may_need_derivative(torch.ones(2))
    v = torch.tensor([-4.0, 1.0, 3.5])
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(prox_owl(forward_ad.make_dual(v, torch.ones(3)), [2.0, 1.0, 0.0]))
        assert found.tangent.tolist() == [0.0, 1.0, 0.0]
    assert torch.equal(found.primal, prox_owl(v, [2.0, 1.0, 0.0]))


def test_a_subgradient_of_the_norm_proves_the_prox():
    v = torch.randn(30, dtype=torch.float64)
    x = prox_owl(v, Ramp(3.0), 0.3)
    assert float(owl_dual_norm(v - x, Ramp(3.0))) == pytest.approx(0.3, rel=1e-12)
    assert float((v - x) @ x) == pytest.approx(0.3 * float(owl_norm(x, Ramp(3.0))), rel=1e-12)


def test_the_dual_norm_is_the_smallest_strength_at_which_everything_is_zero():
    """Against a bisection, and against a solver that is not ours, just above and just below."""
    from sortedl1 import Slope

    rng = np.random.default_rng(1)
    for _ in range(5):
        A, y = rng.standard_normal((30, 9)), rng.standard_normal(30)
        w = Ramp(3.0)(9)
        critical = float(owl_dual_norm(torch.from_numpy(A.T @ y), w))
        low, high = 0.0, 10 * critical
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if not prox_owl(torch.from_numpy(A.T @ y), w, middle).any() else (middle, high)
        assert critical == pytest.approx(high, rel=1e-12)
        for factor in (1.001, 0.999):
            model = Slope(lam=w * critical * factor / 30, alpha=1.0, fit_intercept=False, tol=1e-12).fit(A, y)
            assert np.asarray(model.coef_).any() == (factor < 1)
