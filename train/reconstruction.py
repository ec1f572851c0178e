"""How well a tokenizer gives clips back, in the units of the body."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion import quality
from kinetok.motion.features import joints_from_positions, joints_from_rotations
from kinetok.motion.skeleton import CANONICAL_OFFSETS, FPS
from kinetok.train.data.store import Clip


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """One clip: ``real`` and ``decoded`` features ``[T, 272]``, and the tokens between them ``[n]``."""

    clip: Clip
    real: NDArray[np.float64]
    decoded: NDArray[np.float64]
    tokens: NDArray[np.int64]


@torch.no_grad()
def reconstruct(
    tokenizer: MotionTokenizer, mean: NDArray, std: NDArray, clips: Iterable[Clip], *, most_frames: int = 300
) -> list[Reconstruction]:
    """Encode and decode the first ``most_frames`` of each clip, cut to whole tokens."""
    results = []
    device = tokenizer.decoder.last.weight.device
    for clip in clips:
        unit = tokenizer.config.frames_per_token
        real = clip.features[: min(len(clip.features), most_frames) // unit * unit].astype(np.float64)
        frames = torch.from_numpy(((real - mean) / std).astype(np.float32))[None].to(device)
        tokens = tokenizer.encode(frames)
        decoded = tokenizer.decode(tokens)[0].double().cpu().numpy() * std + mean
        results.append(
            Reconstruction(clip=clip, real=real, decoded=decoded, tokens=tokens[0].cpu().numpy().astype(np.int64))
        )
    if not results:
        raise UserError("expected at least one clip to reconstruct, got none: is the split empty?")
    return results


def physical(features: NDArray) -> dict[str, float]:
    """Figures of features ``[T, 272]``, joints by forward kinematics of the rotations on the canonical body.

    Acceleration relative to the pelvis in mm a frame^2, jerk in m/s^3, foot skate in cm/s (``kinetok.motion.quality``).
    """
    joints = joints_from_rotations(features, np.array(CANONICAL_OFFSETS))
    return {
        "acceleration_mean_mm": 1e3 * quality.acceleration(joints),
        "acceleration_max_mm": 1e3 * quality.acceleration(joints, reduce="max"),
        "jerk": quality.jerk(joints, FPS),
        "foot_skate_cm_s": quality.foot_skate(joints) * FPS,
        "penetration_cm": quality.penetration(joints),
    }


def paired(real: NDArray, decoded: NDArray) -> dict[str, float]:
    """MPJPE relative to the pelvis, mm: by the local positions (section 7), and by the rotations, as files are written."""
    offsets = np.array(CANONICAL_OFFSETS)
    return {
        "mpjpe_mm": 1e3 * quality.mpjpe(joints_from_positions(real), joints_from_positions(decoded)),
        "mpjpe_rotations_mm": 1e3
        * quality.mpjpe(joints_from_rotations(real, offsets), joints_from_rotations(decoded, offsets)),
    }


def reconstruction_figures(results: Iterable[Reconstruction]) -> dict[str, float]:
    """Means over the clips: ``paired``, ``physical`` of the decoded clips and, as ``real_...``, of the real ones.

    Beside them the ratios jerk_ratio and skate_ratio of the means, the codes in use and the number of clips.
    """
    rows, used = [], set()
    for result in results:
        real = {f"real_{name}": value for name, value in physical(result.real).items()}
        rows.append({**paired(result.real, result.decoded), **physical(result.decoded), **real})
        used.update(result.tokens.tolist())
    figures = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {
        **figures,
        "jerk_ratio": figures["jerk"] / figures["real_jerk"],
        "skate_ratio": figures["foot_skate_cm_s"] / figures["real_foot_skate_cm_s"],
        "codes": float(len(used)),
        "clips": float(len(rows)),
    }
