"""What the user says about the classifier: the keys under `[head]`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# bfloat16 holds 8 binary digits: a moment that fades by less than this share of itself stays where it is.
_BF16_LEAST_FADE = 2**-7
# Up to here float32 holds exp(logit), its sum over 2^31 classes, and all that matters beside the largest of a
# row even if that one is at -scale: no maximum has to be taken off first.
FLOAT32_MAX_SCALE = 64.0


class CombinedConfig(BaseModel):
    """The logit cos(m1 theta + m2) - m3 of the target; used by kind = "combined"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    m1: float = Field(1.0, ge=1, le=4, description="factor of the angle, SphereFace's margin")
    m2: float = Field(0.3, ge=0, le=2, description="added to the angle, ArcFace's margin, radians")
    m3: float = Field(0.2, ge=0, le=2, description="taken off the cosine, CosFace's margin")


class AdaFaceConfig(BaseModel):
    """How the embedding's norm shapes the margin; used by kind = "adaface"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    h: float = Field(0.333, ge=0, description="change of the margin, in m, per standard deviation of norm")
    momentum: float = Field(
        0.01, gt=0, le=1, description="share of the newest step in the running statistics of the norms"
    )


class MagFaceConfig(BaseModel):
    """The margin as a line over the embedding's norm, and what pulls norms up; used by kind = "magface"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    norm_low: float = Field(10.0, gt=0, description="norm up to which the margin is m_low")
    norm_high: float = Field(110.0, gt=0, description="norm from which on the margin is m_high")
    m_low: float = Field(0.45, ge=0, le=2, description="margin of the lowest quality, radians")
    m_high: float = Field(0.8, ge=0, le=2, description="margin of the highest quality, radians")
    regulariser: float = Field(35.0, ge=0, description="weight of the regulariser of the norms in the loss")

    @model_validator(mode="after")
    def _norms_rise(self) -> MagFaceConfig:
        if self.norm_low >= self.norm_high:
            raise ValueError(
                f"expected norm_low below norm_high, found {self.norm_low:g} and {self.norm_high:g}"
            )
        return self


class CurricularFaceConfig(BaseModel):
    """How fast hard negatives gain weight; used by kind = "curricularface"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    momentum: float = Field(
        0.01, gt=0, le=1, description="share of the newest step in the running mean of the target's cosine"
    )


class MarginConfig(BaseModel):
    """How much harder the target class is made than the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal[
        "arcface",
        "arcface-straight-through",
        "cosface",
        "combined",
        "adaface",
        "magface",
        "curricularface",
    ] = Field(
        "arcface",
        description="arcface: m is added to the target's angle; arcface-straight-through: the same with a "
        "derivative of 1, as InsightFace computes it; cosface: m is taken off the cosine; combined: both and "
        "a factor; adaface, magface: by the embedding's norm; curricularface: arcface, and harder negatives",
    )
    m: float = Field(
        0.5,
        ge=0,
        le=2,
        description="size of the margin: radians; cosine for cosface, usually 0.35 to 0.4; both for adaface, "
        "usually 0.4; unused by combined and magface",
    )
    combined: CombinedConfig = Field(CombinedConfig(), description="the three margins of combined")
    adaface: AdaFaceConfig = Field(AdaFaceConfig(), description="the norms' part in adaface")
    magface: MagFaceConfig = Field(MagFaceConfig(), description="the norms' part in magface")
    curricularface: CurricularFaceConfig = Field(
        CurricularFaceConfig(), description="the curriculum of curricularface"
    )


class HeadConfig(BaseModel):
    """The margin softmax over all identities, sharded over the ranks, and how its rows are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    margin: MarginConfig = Field(MarginConfig(), description="margin of the target class")
    # Sums of exponentials travel between ranks as float64 without a common maximum: 200 keeps them in range.
    scale: float = Field(64.0, gt=0, le=200, description="factor from cosine to logit")
    sample_rate: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the classes drawn as negatives at each step; the batch's own are always in",
    )
    interclass_filter: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="negatives whose cosine is above it are left out, as likely the same person under "
        "another label; by default none",
    )
    tile: int | None = Field(
        None,
        ge=1,
        description="classes per tile; by default what suits the CPU's cache, 1/64 of the GPU's memory, or, "
        "for kernels, 256 MiB",
    )
    backend: Literal["auto", "kernels", "streaming", "dense"] = Field(
        "auto",
        description="streaming: over tiles of classes; kernels: the same in Triton, for GPUs, float32 rows, "
        "scale <= 64 and margins other than curricularface; dense: all logits, by autograd; auto: kernels "
        "where they can be used, else streaming",
    )
    matrix_inputs: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto",
        description="what unit embeddings, unit rows and probabilities are rounded to before they are "
        "multiplied; rows, moments and sums stay in float32, but a CPU's products of bf16 come out as bf16. "
        "auto: bf16 for kernels (which know tf32 too), fp32 for streaming (which knows all) and dense",
    )
    deterministic: bool = Field(
        False,
        description="kernels in blocks of a fixed size, so that a run repeats bit for bit; by default their "
        "size is tuned by timing, and with it the order of sums",
    )
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="what moves the class rows; rows that a step did not sample stay as they are"
    )
    moments: Literal["fp32", "bf16"] = Field(
        "fp32", description="type in which the optimizer's moments are kept; bf16 takes half the memory"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd; beta1 of adamw")
    beta2: float = Field(
        0.999, ge=0, lt=1, description="beta2 of adamw; at most 0.992 with moments = bf16, which rounds"
    )
    weight_decay: float = Field(
        5e-4,
        ge=0,
        description="decay of the class rows: sgd adds this times a row to its gradient, adamw takes this "
        "times the learning rate off the row",
    )

    @model_validator(mode="after")
    def _moments_can_fade(self) -> HeadConfig:
        if self.optimizer == "adamw" and self.moments == "bf16" and 1 - self.beta2 < _BF16_LEAST_FADE:
            raise ValueError(
                f"moments = bf16 with beta2 = {self.beta2:g}: expected beta2 <= {1 - _BF16_LEAST_FADE:.3g}, "
                "as bfloat16 would round smaller changes away; lower beta2, or set moments = fp32"
            )
        return self
