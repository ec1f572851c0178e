"""The state of a batch of draws on the device."""

import triton
import triton.language as tl

from kinetok.kernels.sampling.state import ENDED, FAILED, FULL, RUNNING

RUNNING_, ENDED_, FULL_, FAILED_ = (tl.constexpr(code) for code in (RUNNING, ENDED, FULL, FAILED))
LAST_ID = tl.constexpr(2**31 - 1)


@triton.jit
def advance(row, token, good, token_ptr, position_ptr, remaining_ptr, status_ptr, end_id):
    """Write the token of a running row, and its state after it."""
    token = tl.where(good, token.to(tl.int64), end_id)
    moved = (token != end_id).to(tl.int64)
    remaining = tl.load(remaining_ptr + row) - moved
    tl.store(token_ptr + row, token)
    tl.store(position_ptr + row, tl.load(position_ptr + row) + moved)
    tl.store(remaining_ptr + row, remaining)
    after = tl.where(moved == 0, ENDED_, tl.where(remaining == 0, FULL_, RUNNING_))
    tl.store(status_ptr + row, tl.where(good, after, FAILED_))


STATE_TYPES = {
    **dict.fromkeys(("seed_ptr", "request_ptr", "position_ptr", "least_ptr", "remaining_ptr", "token_ptr"), "*i64"),
    **dict.fromkeys(("status_ptr", "top_k_ptr", "share_ptr"), "*i32"),
    **dict.fromkeys(("inverse_temperature_ptr", "guidance_ptr"), "*fp32"),
}
