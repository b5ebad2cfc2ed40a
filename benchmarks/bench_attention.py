"""Add-it's attention at one FLUX-shaped site against maps in full; memory of a probe."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairs import ratio, report

from inlay_attention import AttnEdits, Key, Probe, Rows, SiteProgram

HEADS, WIDTH, TEXT, TOKENS = 24, 128, 256, 1024
GAMMA = 1.05
WORDS = (3, 4)


def tensors(tokens, rows=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, HEADS, tokens, WIDTH, generator=g) for _ in range(3)]


def program(probe, tokens=TOKENS, text=TEXT):
    """Weighted extended attention as a plugin emits it (Add-it, eq. 2), optionally with a probe."""
    branches = ("source/text", "edit/text")
    allowed = {Key("p", "gain", "edit"), Key("p", "append", "edit", "source", "join")}
    edits = AttnEdits(frozenset(allowed), "a benchmark", branches, "p")
    edits.on("edit").gain("all", GAMMA).append("source", "image")
    probes = [Probe("w", "p", "edit/text", "columns", frozenset("s"), frozenset({0}), WORDS)]
    spans = {"text": slice(0, text), "image": slice(text, tokens)}
    rows = Rows.of(dict.fromkeys(branches, 1))
    listed = probes if probe else []
    words = {"w": WORDS}
    return SiteProgram("s", rows, edits.by_branch, listed, words, lambda q, k: (spans, spans), {})


def explicit(q, k, v, probe):
    """The same from the paper's equations, every map written out: softmax(Q Kᵀ / √d) V."""
    keys = torch.cat([k[1:] * GAMMA, k[:1, :, TEXT:]], dim=2)
    values = torch.cat([v[1:], v[:1, :, TEXT:]], dim=2)
    source = (q[:1] @ k[:1].transpose(2, 3) / WIDTH**0.5).softmax(-1)
    edit = (q[1:] @ keys.transpose(2, 3) / WIDTH**0.5).softmax(-1)
    seen = edit[:, :, TEXT:, list(WORDS)].mean(1) if probe else None
    return torch.cat([source @ v[:1], edit @ values]), seen


@pytest.mark.parametrize("probe", [False, True], ids=["edits", "edits and a probe"])
def bench_against_explicit_maps(benchmark, probe):
    q, k, v = tensors(TOKENS)
    site = program(probe)

    def ours():
        return site(F.scaled_dot_product_attention, q, k, v)

    def theirs():
        return explicit(q, k, v, probe)

    expected, seen = theirs()
    torch.testing.assert_close(ours(), expected, rtol=1e-3, atol=1e-4)
    if probe:
        torch.testing.assert_close(site.store["w"]["s"], seen, rtol=1e-3, atol=1e-5)
    made = ratio(benchmark, theirs, ours, rounds=9)
    kind = "with a probe" if probe else "without a probe"
    what = f"explicit maps / inlay, one site of {HEADS} heads, {TOKENS} tokens, {kind}"
    value = made.pop("ratio")
    times = {"ours": made["theirs"], "theirs": made["ours"]}
    aim, met = ("reported", True) if probe else ("at least 1.4", value >= 1.4)
    report(f"explicit_{'probe' if probe else 'edits'}", what, aim, value, met, **times)


def resident(reset=False):
    """Peak resident bytes of this process since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def probe_alone(tokens):
    """Peak bytes that one probe adds to a site of so many tokens; in a process of its own."""
    torch.set_num_threads(1)
    q, k, v = tensors(tokens, rows=1)
    site = program(True, tokens, 32)
    site.rows, site.edits = Rows.of({"edit/text": 1}), {}

    def attend(q, k, v, *mask, **options):
        """The probe's call; the site's own output is not what is measured."""
        return v if q.shape == k.shape else F.scaled_dot_product_attention(q, k, v)

    F.scaled_dot_product_attention(q[:, :, :8], k, v)
    before = resident(reset=True)
    site(attend, q, k, v)
    return resident() - before


def bench_probe_memory(benchmark):
    """Each size in a process of its own, whose peak is then its own."""
    sizes, used = (256, 1024, 4096), {}
    folder = str(Path(__file__).parent)

    def measure():
        for tokens in sizes:
            code = f"import bench_attention as b; print(b.probe_alone({tokens}))"
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True
            )
            used[tokens] = int(done.stdout)

    benchmark.pedantic(measure, rounds=1)
    growth = used[4096] / used[1024] / 4
    what = "memory of a probe per token, 4,096 against 1,024 tokens (1: linear; 4: a full map)"
    more = {f"MiB at {tokens}": used[tokens] / 2**20 for tokens in sizes}
    report("probe_memory", what, "at most 1.3", growth, growth <= 1.3, **more)
