"""The fused backend on a GPU against torch's: ``python benchmarks/runtime/check_fused.py --json FILE``.

On the default model in fp32 and bf16, and on two layers as wide as the 7B's and the 3B's (random weights, bf16): logits near
torch's; bits of steps, prefills and clips, alone and in company; a graph's replay against the call that it was captured
from; draws on the device against draws on the host; a crowd whose graphs were captured at its start; an fp8 cache. Then
random joins, leaves, twins, new prompts and faults (soak_crowd.py). Exit code 1 where a check fails or does not end, 2
without a GPU. ``--device cpu`` runs the definitions instead, to check this script.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "src"))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import kinetok  # noqa: E402
from kinetok.model.decoder import MotionDecoder  # noqa: E402
from kinetok.model.presets import decoder_preset  # noqa: E402
from kinetok.runtime import SamplingParams  # noqa: E402
from kinetok.runtime.backends.fused import FusedBackend  # noqa: E402
from kinetok.runtime.backends.torch import TorchBackend  # noqa: E402
from kinetok.runtime.character import Character, Job  # noqa: E402
from kinetok.runtime.memory import bytes_available  # noqa: E402
from kinetok.runtime.scheduler import Scheduler  # noqa: E402

PARTS = "fp32", "bf16", "events", "7B", "3B"
# Largest difference of logits from torch's, as a share of their standard deviation.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.2}
FLOAT8_BOUND = 0.5
PROMPTS = (  # all in its prompt bank: no text encoder is needed
    "a person walks forward",
    "a person runs",
    "a person practices karate",
    "a person dances",
    "a person jumps",
)


@dataclass(frozen=True)
class Finding:
    """A check's name, whether it passed, and the numbers behind that."""

    name: str
    passed: bool
    detail: str


class OnHost:
    """A backend's logits without its draws: the scheduler then draws on the host."""

    def __init__(self, backend: FusedBackend) -> None:
        self.slots, self.capacity, self.device = backend.slots, backend.capacity, backend.device
        self.prefill, self.decode, self.copy = backend.prefill, backend.decode, backend.copy


def checks(decoder: MotionDecoder, texts: Sequence[Tensor], steps: int) -> Iterator[Finding]:
    """All checks of one decoder; texts ``[L, D]``, at least three, and as many tokens as ``steps``, at least 8."""
    yield near_torch(decoder, texts, steps, float8=False)
    yield near_torch(decoder, texts, steps, float8=True)
    for float8 in (False, True):
        yield rows_keep_their_bits(decoder, texts, float8=float8)
        yield clips_keep_their_tokens(decoder, texts, steps, float8=float8)
    yield prefills_keep_their_bits(decoder, texts)
    yield replay_is_the_call(decoder, texts)
    yield device_draws_as_the_host(decoder, texts, steps)
    yield nothing_is_captured_later(decoder, texts, steps)


@torch.inference_mode()
def near_torch(decoder: MotionDecoder, texts: Sequence[Tensor], steps: int, *, float8: bool) -> Finding:
    """Logits on torch's greedy tokens; the best token is the same wherever it leads by more than the bound."""
    bound = FLOAT8_BOUND if float8 else BOUNDS[decoder.embed.weight.dtype]
    capacity = max(map(len, texts)) + steps
    ours = FusedBackend(decoder, len(texts), capacity, float8=float8)
    torchs = TorchBackend(decoder, len(texts), capacity)
    slots, worst, wrong, same, count = list(range(len(texts))), 0.0, 0, 0, 0
    logits = [torch.stack([b.prefill(slot, texts[slot]) for slot in slots]) for b in (torchs, ours)]
    for _ in range(steps):
        wanted, got = logits
        scale = wanted.std(1)
        worst = max(worst, float(((got - wanted).abs().amax(1) / scale).max()))
        best = wanted.topk(2).values
        clear = (best[:, 0] - best[:, 1]) / scale > 2 * bound
        equal = wanted.argmax(1) == got.argmax(1)
        wrong, same, count = wrong + int((clear & ~equal).sum()), same + int(equal.sum()), count + len(slots)
        tokens = wanted[:, : decoder.config.codebook].argmax(1)
        logits = [b.decode(slots, tokens) for b in (torchs, ours)]
    detail = (
        f"largest difference {worst:.2g} standard deviations (bound {bound}), {same} of {count} best tokens the same"
    )
    return Finding(f"logits near torch's{_kv(float8)}", worst <= bound and not wrong, detail)


@torch.inference_mode()
def rows_keep_their_bits(decoder: MotionDecoder, texts: Sequence[Tensor], *, float8: bool) -> Finding:
    """A row's logits in a batch of one and among others, which come and go."""
    capacity = max(map(len, texts)) + 8
    alone = FusedBackend(decoder, 1, capacity, float8=float8)
    among = FusedBackend(decoder, 19, capacity, float8=float8)
    for slot in range(among.slots):
        among.prefill(slot, texts[0] if slot == 9 else texts[1 + slot % (len(texts) - 1)])
    alone.prefill(0, texts[0])
    different = 0
    for step in range(8):
        slots = [slot for slot in range(among.slots) if slot == 9 or (slot + step) % 3]
        tokens = torch.full((len(slots),), 5 + step, device=among.device)
        row = among.decode(slots, tokens)[slots.index(9)]
        different += not torch.equal(row, alone.decode([0], tokens[:1])[0])
    return Finding(f"bits alone and among 19{_kv(float8)}", different == 0, f"{different} of 8 steps differ")


def prefills_keep_their_bits(decoder: MotionDecoder, texts: Sequence[Tensor]) -> Finding:
    """Logits, keys and values of texts and motion in one pass, and one by one."""
    capacity = max(map(len, texts)) + 8
    together, alone = (FusedBackend(decoder, len(texts), capacity) for _ in range(2))
    rows = [(slot, text, list(range(slot % 8))) for slot, text in enumerate(texts)]
    logits = together.prefill_all(rows), torch.stack([alone.prefill(*row) for row in rows])
    passed = torch.equal(*logits) and torch.equal(together.slab, alone.slab)
    difference = float((logits[0] - logits[1]).abs().max())
    return Finding("bits of a prefill alone and with others", passed, f"logits differ by at most {difference:.2g}")


def clips_keep_their_tokens(decoder: MotionDecoder, texts: Sequence[Tensor], steps: int, *, float8: bool) -> Finding:
    """Whole clips drawn on the device, alone and in a crowd whose characters join one after the other."""
    made = jobs(texts, steps)
    capacity = max(map(len, texts)) + steps

    def backend(slots: int) -> FusedBackend:
        return FusedBackend(decoder, slots, capacity, float8=float8)

    crowd = _run(Scheduler(backend(2 * len(made)), decoder.config, len(made)), made, every=2)
    lonely = [_run(Scheduler(backend(2), decoder.config, 1), [job], every=1)[0] for job in made]
    wrong = [i for i, (a, b) in enumerate(zip(crowd, lonely, strict=True)) if a.tokens != b.tokens or a.state != "done"]
    detail = f"{len(wrong)} of {len(made)} clips differ; {sum(len(c.tokens) for c in crowd)} tokens"
    return Finding(f"clips alone and in a crowd{_kv(float8)}", not wrong, detail)


@torch.inference_mode()
def replay_is_the_call(decoder: MotionDecoder, texts: Sequence[Tensor]) -> Finding:
    """Logits of a captured graph, replayed twice, against the same kernels called one by one."""
    capacity = max(map(len, texts)) + 4
    replayed, called = (FusedBackend(decoder, 3, capacity) for _ in range(2))
    called._run = lambda key, call: call()  # type: ignore[method-assign]
    for backend in (replayed, called):
        for slot in range(3):
            backend.prefill(slot, texts[slot])
    different = 0
    for step in range(3):
        tokens = torch.tensor([3, 7, 1], device=replayed.device) + step
        different += not torch.equal(replayed.decode([0, 1, 2], tokens), called.decode([0, 1, 2], tokens))
    captured = len(replayed._graphs)
    passed = different == 0 and captured == (1 if replayed.device.type == "cuda" else 0)
    return Finding("a graph's replay is the call", passed, f"{different} of 3 steps differ, {captured} graphs captured")


def nothing_is_captured_later(decoder: MotionDecoder, texts: Sequence[Tensor], steps: int) -> Finding:
    """A crowd after ``warm_up``: its clips are those of one without, and none of its steps waits for a capture."""
    made, capacity = jobs(texts, steps), max(map(len, texts)) + steps
    warm, cold = (FusedBackend(decoder, 2 * len(made), capacity) for _ in range(2))
    free, began = bytes_available(warm.device), time.perf_counter()
    warm.warm_up()
    if warm.device.type == "cuda":
        torch.cuda.synchronize()
    took, left, before = time.perf_counter() - began, bytes_available(warm.device), set(warm._graphs)
    clips = [
        [character.tokens for character in _run(Scheduler(backend, decoder.config, len(made)), made, every=1)]
        for backend in (warm, cold)
    ]
    later = set(warm._graphs) - before
    same = "the same" if clips[0] == clips[1] else "other"
    detail = f"{len(before)} graphs in {took:.1f} s, {len(later)} later, {same} clips"
    if free is not None and left is not None and before:
        detail += f", {(free - left) / 1e6:.0f} MB"
    passed = clips[0] == clips[1] and not later and bool(before) == (warm.device.type == "cuda")
    return Finding("nothing is captured after a warm-up", passed, detail)


def device_draws_as_the_host(decoder: MotionDecoder, texts: Sequence[Tensor], steps: int) -> Finding:
    """The same kernels' logits, drawn on the device a step ahead and drawn on the host."""
    made, capacity = jobs(texts, steps), max(map(len, texts)) + steps
    backends = [FusedBackend(decoder, 2 * len(made), capacity) for _ in range(2)]
    crowds = [Scheduler(backend, decoder.config, len(made)) for backend in (backends[0], OnHost(backends[1]))]  # type: ignore[arg-type]
    ours, hosts = (_run(crowd, made, every=1) for crowd in crowds)
    wrong = [i for i, (a, b) in enumerate(zip(ours, hosts, strict=True)) if (a.tokens, a.state) != (b.tokens, b.state)]
    return Finding("draws on the device are the host's", not wrong, f"{len(wrong)} of {len(made)} clips differ")


def jobs(texts: Sequence[Tensor], steps: int) -> list[Job]:
    """Greedy, sampled in several ways, guided, with a window that slides, and with an end token that may come."""
    plain = SamplingParams(temperature=1.0, top_k=0, top_p=0.9, guidance=1.0)
    chosen = [
        replace(plain, temperature=0),
        replace(plain, top_k=40, seed=2**64 - 1),
        replace(plain, guidance=2.5),
        replace(plain, temperature=0.5, top_p=1.0, seed=3),
        replace(plain, guidance=1.5, temperature=0, seed=4),
        replace(plain, seed=5),
    ]
    made = []
    for i, params in enumerate(chosen):
        guided, slides, ends = params.guidance != 1.0, i in (2, 3), i == 5
        made.append(
            Job(
                text=texts[i % len(texts)],
                empty=texts[-1][:1] if guided else None,
                params=params,
                least=0 if ends else steps,
                most=steps,
                request=i,
                window=6 if slides else steps,
                keep=3,
            )
        )
    return made


def _run(crowd: Scheduler, made: Sequence[Job], *, every: int) -> list[Character]:
    """Submit a job every so many steps, and step until all are over."""
    characters: list[Character] = []
    for _ in range(100_000):
        if len(characters) < len(made):
            characters.append(crowd.submit(made[len(characters)]))
        for _ in range(every):
            crowd.step()
        if len(characters) == len(made) and all(c.over for c in characters):
            return characters
    raise AssertionError("somebody never ends")


def _kv(float8: bool) -> str:
    return ", fp8 cache" if float8 else ""


def wide(size: str, device: str) -> MotionDecoder:
    """Two layers of a released size in bf16 with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return MotionDecoder(replace(decoder_preset(size), n_layer=2)).to(torch.bfloat16).eval()


def random_events(device: str, events: int) -> Finding:
    """soak_crowd.py on the fused backend; it raises where anything is wrong."""
    spec = importlib.util.spec_from_file_location("soak_crowd", Path(__file__).with_name("soak_crowd.py"))
    assert spec is not None and spec.loader is not None
    soak = importlib.util.module_from_spec(spec)
    sys.modules["soak_crowd"] = soak
    spec.loader.exec_module(soak)
    chaos = soak.Chaos(1, backend="fused", device=device)
    try:
        for _ in range(events):
            chaos.event()
        chaos.finish()
    except AssertionError as error:
        return Finding("random events", False, f"after {dict(chaos.counts)}: {error}")
    return Finding("random events", True, str(dict(chaos.counts)))


def part(name: str, device: str, steps: int, events: int) -> Iterator[Finding]:
    """The checks of one of ``PARTS``."""
    if name == "events":
        yield random_events(device, events)
        return
    if name in ("fp32", "bf16"):
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[name]
        engine = kinetok.load(device=device, dtype=dtype, backend="torch")  # weights stay plain for torch
        decoder, texts = engine.model.decoder, [engine._features(prompt) for prompt in PROMPTS]
    else:
        decoder, generator = wide(name, device), torch.Generator(device).manual_seed(0)
        width = decoder.config.text_dim
        texts = [torch.randn(n, width, device=device, generator=generator) for n in (9, 4, 17)]
    yield from checks(decoder, texts, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=48, help="tokens of a clip")
    parser.add_argument("--events", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=150, help="stop what has not ended by then")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        for finding in part(options.part, options.device, options.steps, options.events):
            print(json.dumps(asdict(finding)), flush=True)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        print("check_fused.py: torch finds no CUDA GPU; nothing was checked", file=sys.stderr)
        sys.exit(2)
    rows = together(options)
    about = torch.cuda.get_device_name() if options.device == "cuda" else "cpu (definitions)"
    found = {"device": about, "torch": torch.__version__, "checks": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not all(row["passed"] for row in rows))


def together(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All parts at once, a process each, as most of the time goes to compiling; a part that breaks is a failed check."""
    until, running = time.monotonic() + options.seconds, {}
    for name in PARTS if options.device == "cuda" else ("fp32", "events"):
        command = [sys.executable, __file__, "--part", name, "--json", str(options.json), "--device", options.device]
        command += ["--steps", str(options.steps), "--events", str(options.events)]
        running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rows = []
    for name, process in running.items():
        try:
            said, errors = process.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, errors = process.communicate()
        found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        if process.returncode:
            why = (errors.strip().splitlines() or ["stopped"])[-1]
            found.append(
                {"name": "runs to its end", "passed": False, "detail": f"code {process.returncode}: {why[:400]}"}
            )
        for row in found:
            rows.append({"part": name, **row})
            print(f"{'ok    ' if row['passed'] else 'FAILED'} {name}: {row['name']}: {row['detail']}", flush=True)
    return rows


if __name__ == "__main__":
    main()
