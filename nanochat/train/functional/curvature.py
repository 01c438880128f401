"""Curvature of a loss: products with its Hessian, the largest eigenvalues, the trace, and the optimizer's view of it.

Products take trees; the algorithms take flat vectors, which `ravel` makes of trees. A `Matvec` is linear and symmetric.
The loss has to be the plain one (no chunk_tokens) with `attention.math`: other kernels have no second derivatives.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from nanochat import tree
from nanochat.config import UserError
from nanochat.optim import MATRIX, Hparams, OptState
from nanochat.optim.muon_adamw import ADAM_EPS, POLAR_EXPRESS

Matvec = Callable[[Tensor], Tensor]


def ravel(params: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the leaves of a tree as one vector (n,), and the function that makes the tree of such a vector again."""
    leaves = tree.leaves(params)

    def unravel(vector: Tensor) -> Any:
        parts = iter(vector.split([x.numel() for x in leaves]))
        return tree.map(lambda x: next(parts).view(x.shape), params)

    return torch.cat([x.flatten() for x in leaves]), unravel


def hvp(loss: Callable[[Any], Tensor], params: Any) -> Callable[[Any], Any]:
    """Return v -> H·v for the Hessian H of a 0-d loss at `params`, forward over reverse; v is like `params`."""
    gradient = torch.func.grad(loss)
    return lambda v: torch.func.jvp(gradient, (params,), (v,))[1]


class Spectrum(NamedTuple):
    """The upper end of a spectrum, largest first, and the smallest eigenvalue that was seen."""

    values: Tensor  # (k,) float64
    errors: Tensor  # (k,) float64: an eigenvalue of the matrix is at most so far away (the norm of the residual)
    vectors: Tensor  # (k, n), orthonormal
    smallest: float
    products: int  # with the matrix


def lanczos(matvec: Matvec, start: Tensor, k: int, iterations: int, tolerance: float = 0.0) -> Spectrum:
    """Return the k largest eigenvalues by the Lanczos method with full reorthogonalization.

    It holds `iterations` vectors (n,). With as many iterations as dimensions the values are exact.

    Args:
        start: (n,) a random vector, of the dtype to compute in.
        tolerance: stop when the errors of all k are below this share of the largest absolute eigenvalue.

    Source: Golub and Van Loan, Matrix Computations, chapter 10.
    """
    iterations = min(iterations, start.numel())
    generator = torch.Generator(start.device).manual_seed(0)
    basis = start.new_empty((iterations, start.numel()))
    diagonal: list[float] = []
    beside: list[float] = []  # the diagonal
    q = start / start.norm()
    for step in range(iterations):
        basis[step] = q
        w = matvec(q)
        diagonal.append(float(q @ w))
        w, rest = _orthogonal(w, basis[: step + 1])
        if not math.isfinite(diagonal[-1] + rest):
            raise UserError(f"product {step + 1} with the Hessian is not finite")
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        scale = float(values.abs().max())
        errors = (rest * vectors[-1].abs()).flip(0)[:k]
        if step + 1 == iterations or (step + 1 >= k and float(errors.max()) <= tolerance * scale):
            break
        if rest <= 100 * torch.finfo(q.dtype).eps * scale:  # an invariant subspace: go on in what is orthogonal to it
            w = torch.randn(q.shape, generator=generator, device=q.device, dtype=q.dtype)
            w, rest = _orthogonal(w, basis[: step + 1])[0], 0.0
        beside.append(rest)
        q = w / w.norm()
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    ritz = vectors.T.to(basis) @ basis[: len(diagonal)]
    return Spectrum(
        values, errors, ritz, float(torch.linalg.eigvalsh(_tridiagonal(diagonal, beside))[0]), len(diagonal)
    )


def _orthogonal(w: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """Return `w` without its part in the span of an orthonormal basis (m, n), and the norm of what is left."""
    before = float(w.norm())
    w = w - basis.T @ (basis @ w)
    if (after := float(w.norm())) < 0.7 * before:  # rounding errors would grow; twice is enough
        w = w - basis.T @ (basis @ w)
        after = float(w.norm())
    return w, after


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    off = torch.tensor(beside, dtype=torch.float64)
    return torch.tensor(diagonal, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1)


def hutchinson(
    matvec: Matvec, like: Tensor, samples: int, generator: torch.Generator, deflate: Tensor | None = None
) -> tuple[float, float]:
    """Return (estimate of the trace, its standard error) from products with random signs (Rademacher).

    Args:
        like: (n,) for size, dtype and device. samples: at least 2.
        deflate: (k, n) orthonormal vectors on which the trace is computed instead of estimated: with the largest
            eigenvectors the error is much smaller.

    Source: Hutchinson 1990; deflation: Hutch++, arXiv 2010.09649.
    """
    values = []
    for _ in range(samples):
        signs = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
        z = (2 * signs - 1).to(like.dtype)
        if deflate is not None:
            z = z - deflate.T @ (deflate @ z)
        values.append(float(z @ matvec(z)))
    exact = sum(float(v @ matvec(v)) for v in (deflate if deflate is not None else []))
    estimates = torch.tensor(values, dtype=torch.float64)
    return exact + float(estimates.mean()), float(estimates.std() / samples**0.5)


def inverse_root(opt_state: OptState, hparams: Hparams) -> Callable[[TensorDict], TensorDict]:
    """Return v -> P^(-1/2)·v, where P^(-1) is what the optimizer multiplies its momentum by to make a step.

    The largest eigenvalue of P^(-1/2)·H·P^(-1/2) is the preconditioned sharpness, here with the learning rates in P, as
    they differ between the groups: on a quadratic, a step without momentum diverges where it is over 2, one with
    momentum β (an average, as in AdamW) where it is over 2·(1 + β) / (1 - β).

    AdamW: P^(-1) = lr / (sqrt(v̂) + eps), as in the source; 0 where v is 0, in rows that no token has used.
    Muon: its step is the orthogonalized momentum, M·(Mᵀ·M)^(-1/2) = (M·Mᵀ)^(-1/2)·M, so that P^(-1) =
    lr·sqrt(max(1, r/c))·(M·Mᵀ)^(-1/2), on the shorter side of M (r, c), with M as it is now. Singular values below what
    Polar Express can bring to one count as that. Its division by the running variance of rows is not part of P.

    Args:
        hparams: of a step, see `optim.hparams`; a learning rate of 1 in each group gives the source's sharpness.

    Source: Cohen et al. 2022, Adaptive gradient methods at the edge of stability (arXiv 2207.14484).
    """
    t = int(opt_state["step"])
    factors: dict[str, Tensor] = {}  # of AdamW's parameters, elementwise
    roots: dict[str, Tensor] = {}  # of Muon's, on the shorter side
    for group, h in hparams.items():
        if group == MATRIX:
            for name, momentum in tree.flatten(opt_state[group, "momentum"]).items():
                roots[name] = _polar_root(momentum, float(h["lr"]))
        else:
            for name, v in tree.flatten(opt_state[group, "v"]).items():
                gain = h["lr"] / ((v / (1 - h["beta2"] ** t)).sqrt() + ADAM_EPS)
                factors[name] = torch.where(v > 0, gain, 0.0).sqrt()

    def apply(v: TensorDict) -> TensorDict:
        flat = dict(tree.flatten(v))
        for name, factor in factors.items():
            flat[name] = flat[name] * factor.to(flat[name])
        for name, root in roots.items():
            x, root = flat[name], root.to(flat[name])
            flat[name] = root @ x if len(root) == len(x) else x @ root
        return tree.unflatten({name: flat[name] for name in tree.flatten(v)}, v)

    return apply


def _polar_root(momentum: Tensor, lr: float) -> Tensor:
    """Return the square root of lr·sqrt(max(1, r/c))·(M·Mᵀ)^(-1/2), or of (Mᵀ·M)^(-1/2) where r > c."""
    rows, columns = momentum.shape
    m = momentum.cpu().double()  # not every device has float64
    m = m if rows <= columns else m.T
    squares, vectors = torch.linalg.eigh(m @ m.T)
    least = m.norm() / math.prod(a for a, _, _ in POLAR_EXPRESS)
    gain = lr * max(1.0, rows / columns) ** 0.5 / torch.maximum(squares.clamp_min(0).sqrt(), least)
    return ((vectors * gain.sqrt()) @ vectors.T).to(momentum)
