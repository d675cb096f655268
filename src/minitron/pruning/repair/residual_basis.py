"""The student's residual stream: some of the teacher's channels, or directions that combine all of them.

Matrices that write to the teacher's stream are changed to write the student's, and matrices that read it to read the
student's. A basis is folded into the weights together with the gains of the norms, so the student is a plain checkpoint
of the same family. One basis for the whole network needs no adapters. This goes beyond the papers, which keep channels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minitron.calibration.statistics import Statistics, require_second_moment
from minitron.core.errors import PlanError
from minitron.core.numerics import add_gram, matmul_precision, normalized
from minitron.model.architecture import Architecture
from minitron.model.checkpoint import Checkpoint
from minitron.pruning.plan import Plan
from minitron.pruning.repair.columns import CORRELATION_RIDGE, correlation_factor

READ_ROWS = 256


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream: its gain (the stored weight plus the family's offset), and its bias, if any."""

    gain: Float[Tensor, " hidden"]
    bias: Float[Tensor, " hidden"] | None = None


@dataclass(frozen=True)
class Channels:
    """Some of the teacher's channels."""

    kept: Int[Tensor, " kept"]

    def to(self, device: torch.device) -> "Channels":
        return Channels(self.kept.to(device))

    def write(self, matrix: Float[Tensor, "hidden ..."]) -> Float[Tensor, "kept ..."]:
        return matrix[self.kept]

    def embed(self, rows: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows kept"]:
        return rows[:, self.kept]

    def read(self, matrix: Float[Tensor, "rows hidden"], norm: Norm | None) -> Float[Tensor, "rows kept"]:
        return matrix[:, self.kept]

    def norm(self, norm: Norm, scale: float, *, tied: bool = False) -> Norm:
        """The student's norm, with its output multiplied by `scale`."""
        return Norm(scale * norm.gain[self.kept], None if norm.bias is None else norm.bias[self.kept])


@dataclass(frozen=True)
class Basis:
    """The student's stream is y = x @ directions, and y @ directions.T approximates the teacher's x."""

    directions: Float[Tensor, "hidden kept"]  # orthonormal columns

    def to(self, device: torch.device) -> "Basis":
        return Basis(self.directions.to(device))

    def write(self, matrix: Float[Tensor, "hidden ..."]) -> Float[Tensor, "kept ..."]:
        return self.directions.T @ matrix

    def embed(self, rows: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows kept"]:
        return rows @ self.directions

    def read(self, matrix: Float[Tensor, "rows hidden"], norm: Norm | None) -> Float[Tensor, "rows kept"]:
        """A matrix that reads the stream through a norm, with the norm's gain and bias."""
        assert norm is not None, "require_basis lets no family read the stream without a norm"
        folded = matrix @ (norm.gain[:, None] * self.directions / _rms(norm.gain))
        if norm.bias is None:
            return folded
        # The stream has no part along (1, 1, ...): along it the matrix holds its product with the norm's bias, and the
        # student's norm has a bias of ones.
        return folded + (matrix @ norm.bias)[:, None] / self.directions.shape[1]

    def norm(self, norm: Norm, scale: float, *, tied: bool = False) -> Norm:
        """The student's norm, with one gain for all directions: the rest is folded into the matrices after it.

        Args:
            tied: whether the norm stands before the embedding, which cannot hold gains; then each direction has a gain.
        """
        if tied:
            gains = (norm.gain[:, None] * self.directions.square()).sum(0)
        else:
            # The overall size of the gains stays in the norm, so that the matrices keep their size.
            gains = _rms(norm.gain).expand(self.directions.shape[1])
        gains = gains * scale
        return Norm(gains, None if norm.bias is None else torch.ones_like(gains))


Residual = Channels | Basis


class Reads:
    """Sums over the tokens at one norm, by which the matrices after it read the student's stream.

    With u the teacher's normalised state and v the student's, v = y / rms(y) of y = u @ directions, the matrices read
    the least-squares guess of u from v: E[u v'] E[v v']^-1 v. Directions that are gone are read from those that stay,
    as far as they go together at this norm.
    """

    def __init__(self, basis: Basis, *, centred: bool):
        self._basis, self._centred = basis, centred
        hidden, kept = basis.directions.shape
        self._squares = basis.directions.new_zeros(kept, kept)  # of v v', in the upper triangle
        self._products = basis.directions.new_zeros(hidden, kept)  # of u v'

    def add(self, states: Float[Tensor, "*tokens hidden"]) -> None:
        teacher = normalized(states.flatten(0, -2), centred=self._centred)
        student = normalized(self._basis.embed(teacher), centred=False)
        add_gram(self._squares, student, states.dtype)
        with matmul_precision(states.dtype):
            self._products.addmm_(teacher.T, student)

    def reader(self, scale: float) -> Basis:
        """The basis through which matrices read, of a norm whose gain has the factor `scale`; on the CPU.

        A guess that the tokens do not determine stays near the directions. The sums are overwritten.
        """
        prior = scale * self._basis.directions
        squares = self._squares.triu() + self._squares.triu(1).T
        errors = self._products.addmm_(prior, squares, alpha=-1)
        root, factor = correlation_factor(self._squares, CORRELATION_RIDGE)
        guess = prior + torch.cholesky_solve((errors / root).T, factor).T / root
        if self._centred:  # the student's state has no part along (1, 1, ...)
            guess -= guess.mean(1, keepdim=True)
        return Basis((guess / scale).cpu())


def residual_basis(
    moment: Float[Tensor, "hidden hidden"], hidden: int, *, centred: bool = False, tied: Norm | None = None
) -> Basis:
    """The `hidden` directions that hold most of the normalised stream's energy: the leading eigenvectors.

    Args:
        moment: E[u u'] of the normalised stream u, over all modules that read it.
        centred: whether the norms are LayerNorms. The mean is subtracted first, and one direction is left unused, so
            that the student's norm finds no mean to subtract.
        tied: the final norm, where the embedding E is also the output projection. The student's logits are then
            y diag(g') (E V)' = x V diag(g') V' E' with its gains g'. The directions V are rotated among themselves
            until V' diag(g) V is diagonal for the teacher's gains g. If g' is this diagonal, V diag(g') V' equals
            diag(g) on the space of the directions.
    """
    moment = moment.double()
    if centred:
        moment = moment - moment.mean(0)
        moment = moment - moment.mean(1, keepdim=True)
    directions = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : hidden - centred]
    if centred:
        directions = directions @ _zero_sum(hidden)
    elif tied is not None:
        gains = directions.T @ (tied.gain.double()[:, None] * directions)
        directions = directions @ torch.linalg.eigh(gains).eigenvectors
    return Basis(directions.float())


def leading_directions(checkpoint: Checkpoint, plan: Plan, statistics: Statistics) -> Basis:
    """The residual basis of a student.

    Raises: PlanError if the statistics hold no second moment.
    """
    architecture, tied = checkpoint.architecture, checkpoint.architecture.tied(checkpoint.config)
    require_second_moment(statistics)
    assert statistics.second_moment is not None
    return residual_basis(
        statistics.second_moment,
        plan.student.hidden,
        centred=architecture.centred_norms,
        tied=read_norm(checkpoint, architecture.final_norm) if tied else None,
    )


def reading_moment(checkpoint: Checkpoint, statistics: Statistics) -> Float[Tensor, "hidden hidden"]:
    """How strongly the layers' matrices read each direction of the stream, float64.

    Let R be this matrix, C the covariance of the normalised stream, and Q a projection. The trace of R Q C Q is the
    share of the variance of the matrices' outputs that comes from the directions of Q, as a mean over matrices: each
    matrix W after a norm of gain g adds g W' W g / trace(W g C g W'). READ_ROWS rows of a matrix stand for all.

    Raises: PlanError if the statistics hold no second moment.
    """
    covariance = statistics.covariance().float()
    found = torch.zeros_like(covariance, dtype=torch.float64)
    matrices = [spec for spec in checkpoint.specs() if spec.layer is not None and spec.reads("hidden")]
    for spec in matrices:
        weight = checkpoint.read_middle(spec.name, READ_ROWS).float()
        norm = checkpoint.architecture.norm_before(spec.name.removesuffix(".weight"), spec.layer)
        if norm is not None:
            weight = weight * read_norm(checkpoint, norm).gain
        found += (weight.T @ weight / ((weight @ covariance) * weight).sum()).double() / len(matrices)
    return found


def basis_obstacle(architecture: Architecture, *, tied: bool) -> str | None:
    """The reason why a model of this family cannot express a rotated stream; None if it can."""
    if tied and architecture.centred_norms:
        return "with tied embeddings there is no matrix after the last norm that could hold the norm's bias"
    if architecture.channel_norms:
        norms = ", ".join(name.removesuffix(".weight") for name in architecture.channel_norms)
        return f"{norms} scale the channels of what is added to the residual stream"
    return None


def require_basis(architecture: Architecture, tied: bool) -> None:
    """Raises: PlanError if a model cannot have a residual basis."""
    obstacle = basis_obstacle(architecture, tied=tied)
    if obstacle:
        raise PlanError(
            f"this {architecture.name} model cannot have a residual basis, for {obstacle}: "
            "leave `basis` out of repair.steps"
        )


def scale_of(residual: Residual, states: Float[Tensor, "tokens hidden"], centred: bool) -> Float[Tensor, " tokens"]:
    """The factor of each token for the student's norm, so that it gives its part of the teacher's normalised state."""
    return residual.embed(normalized(states, centred=centred)).square().mean(-1).sqrt()


def read_norm(checkpoint: Checkpoint, name: str) -> Norm:
    """A norm's gain and bias in float32."""
    gain = checkpoint.read(f"{name}.weight").float() + checkpoint.architecture.norm_gain_offset
    return Norm(gain, checkpoint.read(f"{name}.bias").float() if f"{name}.bias" in checkpoint.stored else None)


def _zero_sum(hidden: int) -> Float[Tensor, "less hidden"]:
    """Orthonormal rows, all orthogonal to (1, 1, ...)."""
    basis = torch.eye(hidden, dtype=torch.float64)
    basis[:, 0] = 1
    return torch.linalg.qr(basis).Q[:, 1:].T


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
