"""How well a tokenizer gives clips back, in the units of the body."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kinetok.errors import UserError
from kinetok.model.tokenizer import MotionTokenizer
from kinetok.motion import quality
from kinetok.motion.features import joints_from_rotations
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
    for clip in clips:
        unit = tokenizer.config.frames_per_token
        real = clip.features[: min(len(clip.features), most_frames) // unit * unit].astype(np.float64)
        tokens = tokenizer.encode(torch.from_numpy(((real - mean) / std).astype(np.float32))[None])
        decoded = tokenizer.decode(tokens)[0].double().numpy() * std + mean
        results.append(Reconstruction(clip=clip, real=real, decoded=decoded, tokens=tokens[0].numpy().astype(np.int64)))
    if not results:
        raise UserError("expected at least one clip to reconstruct, got none: is the split empty?")
    return results


def reconstruction_figures(results: Iterable[Reconstruction]) -> dict[str, float]:
    """Means over the clips; joints by forward kinematics of the rotations, as files are written.

    mpjpe_mm and acceleration (mean and maximum over the joints, mm a frame^2) relative to the pelvis; root_mm the distance
    of the pelvis path; jerk and foot skate of the decoded clips beside the real ones' (``kinetok.motion.quality``).
    """
    offsets = np.array(CANONICAL_OFFSETS)
    rows, used = [], set()
    for result in results:
        real, decoded = (joints_from_rotations(x, offsets) for x in (result.real, result.decoded))
        row = {
            "mpjpe_mm": 1e3 * quality.mpjpe(real, decoded),
            "root_mm": 1e3 * float(np.linalg.norm(real[:, 0] - decoded[:, 0], axis=-1).mean()),
        }
        for name, joints in (("", decoded), ("real_", real)):
            row[f"{name}acceleration_mean_mm"] = 1e3 * quality.acceleration(joints)
            row[f"{name}acceleration_max_mm"] = 1e3 * quality.acceleration(joints, reduce="max")
            row[f"{name}jerk_m_per_s3"] = quality.jerk(joints, FPS)
            row[f"{name}foot_skate_cm_per_s"] = quality.foot_skate(joints) * FPS
        rows.append(row)
        used.update(result.tokens.tolist())
    figures = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {**figures, "codes": float(len(used)), "clips": float(len(rows))}
