"""What is verified of every family of the zoo, each against torch alone: a plain patch of SDPA.

Used by tests/test_backbone_matrix.py and by docs/generate.py, which writes docs/backbones.md.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone_zoo import WIDTH, Family, drawn
from inlay import Rows
from inlay.backbones import token_spans
from inlay.backbones.token_spans import SiteSpans
from inlay_attention import AttnEdits, Held, Key, Seam, SiteProgram, attention_modules

STOCK = F.scaled_dot_product_attention
ROWS = Rows.of({"edit/text": 1, "other/text": 1})  # only the first one is edited
WEIGHT, FOREIGN = 0.25, 3  # of the scale that is tried; how many keys are appended


class Case:
    """A family's model and call with what the probe says of it."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.model, self.call = family.build()
        self.plain = self.run()
        self.sites = token_spans.probe(self.model, (), self.call)
        self.reads_text = {n: spans for n, spans in self.sites.items() if "text" in spans.keys}

    @torch.no_grad()
    def run(self, **changed: Any) -> Tensor:
        """The stock output, rows first."""
        out = self.model(**self.call | changed)[0]
        return torch.stack(out) if isinstance(out, list) else out

    def keys_seen(self, **changed: Any) -> list[tuple[str, Tensor]]:
        """(site, keys `R h m d`) of every call of SDPA in a stock forward, in order."""
        seen = []

        def note(site, q, k, v, mask, scale):
            seen.append((site, k))
            return STOCK(q, k, v, mask, scale=scale)

        with replaced(self.model, note):
            self.run(**changed)
        return seen

    @cached_property
    def called(self) -> list[str]:
        """The attention modules that call SDPA, as often as they do."""
        return [site for site, _ in self.keys_seen()]

    @property
    def without_softmax(self) -> dict[str, str]:
        """The other ones, and their processors."""
        others = attention_modules(self.model).items()
        return {n: type(m.processor).__name__ for n, m in others if n not in self.called}

    def first_key_of_a_word(self) -> tuple[list[list[int]], SiteSpans]:
        """(row, key) of what moves with prompt token 1 of row 0, under attention as it is, where a
        prompt is first read: nothing has been mixed there yet."""
        name = "cap_feats" if "cap_feats" in self.call else "encoder_hidden_states"
        other = torch.stack(list(self.call[name])).clone()
        other[0, 1] += drawn(WIDTH, seed=9)
        moved = self.keys_seen(**{name: list(other) if name == "cap_feats" else other})
        pairs = zip(self.keys_seen(), moved, strict=True)
        (site, was), (_, now) = next(pair for pair in pairs if pair[0][0] in self.reads_text)
        return (now != was).any(dim=(1, 3)).nonzero().tolist(), self.sites[site]

    def written_out(self, op: str) -> Tensor:
        """The output with every softmax of the edited row written out, by a plain patch."""

        def attend(site, q, k, v, mask, scale):
            out = STOCK(q, k, v, mask, scale=scale)
            if site not in self.reads_text:
                return out
            scale = scale or q.shape[-1] ** -0.5
            logits = q[:1] @ k[:1].mT * scale
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
            logits = logits if mask is None else logits + mask[:1]
            if op == "scale":
                p = logits.softmax(-1)
                p[..., self.sites[site].keys["text"]] *= WEIGHT
                out[:1] = p @ v[:1]
            else:
                new_k, new_v = foreign(q)
                p = torch.cat([logits, q[:1] @ new_k.mT * scale], -1).softmax(-1)
                out[:1] = p @ torch.cat([v[:1], new_v], 2)
            return out

        with replaced(self.model, attend):
            return self.run()

    def edited(self, op: str) -> Tensor:
        """The output with the same edit as data, at every site that reads a prompt."""
        modules = attention_modules(self.model)
        with Seam({site: modules[site] for site in self.reads_text}) as seam:
            seam.programs = {s: program(op, s, spans) for s, spans in self.reads_text.items()}
            out = self.run()
            seam.check()
        return out


@contextmanager
def replaced(model: nn.Module, function: Callable[..., Tensor]) -> Iterator[None]:
    """`function(site, q, k, v, mask, scale)` in place of SDPA within attention modules; grouped
    keys are repeated before. SDPA elsewhere (HunyuanDiT pools its prompt by it) is left alone."""
    inside: list[str] = []

    def sdpa(query, key, value, attn_mask=None, *rest, scale=None, enable_gqa=False, **options):
        if not inside:
            options |= {"scale": scale, "enable_gqa": enable_gqa}
            return STOCK(query, key, value, attn_mask, *rest, **options)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return function(inside[-1], query, key, value, attn_mask, scale)

    with ExitStack() as stack:
        for name, module in attention_modules(model).items():
            enter = module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            leave = module.register_forward_hook(lambda *_: inside.pop() and None)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.callback(setattr, F, "scaled_dot_product_attention", STOCK)
        F.scaled_dot_product_attention = sdpa
        yield


def foreign(q: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `1 h m d` of nobody in this call, for a site with queries `R h n d`."""
    shape = 1, q.shape[1], FOREIGN, q.shape[3]
    return drawn(*shape, seed=5), drawn(*shape, seed=6)


def program(op: str, site: str, spans: SiteSpans) -> Callable[..., Tensor]:
    """What a site computes: the prompt scaled, or foreign keys beside its own."""
    given = {"from_": "given:keys", "how": "join"} if op == "append" else {}
    key = Key("a check", op, "edit/text", keys="text" if op == "scale" else "all", **given)
    edits = AttnEdits({key}, "a check", tuple(ROWS), "a check").on("edit/text")
    edits = edits.scale("text", WEIGHT) if op == "scale" else edits.append("given:keys")

    def run(sdpa: Callable[..., Tensor], q: Tensor, *rest: Any, **options: Any) -> Tensor:
        def both(queries: int, keys: int) -> tuple[dict[str, slice], dict[str, slice]]:
            return spans.queries, spans.keys

        held = {"given:keys": Held(*foreign(q))}
        lowered = SiteProgram(site, ROWS, edits.by_branch, [], {}, both, {}, held)
        return lowered(sdpa, q, *rest, **options)

    return run


def every_site_once(case: Case) -> bool:
    """The sites are the attention modules that call SDPA, each once; others have no softmax."""
    linear = all("Linear" in name for name in case.without_softmax.values())
    return case.called == list(case.sites) and linear


def tokens_found(case: Case) -> bool:
    """A word of the prompt moves its own key alone, in attention as it is; joint sites hold prompt
    and picture in the family's order."""
    moved, spans = case.first_key_of_a_word()
    joint = [lengths(s.keys) for s in case.sites.values() if s.kind == "joint"]
    ordered = all(found == list(case.family.joint.items()) for found in joint)
    return moved == [[0, spans.keys["text"].start + 1]] and ordered


def lengths(spans: dict[str, slice]) -> list[tuple[str, int]]:
    return [(name, at.stop - at.start) for name, at in spans.items()]


def exact(case: Case, op: str) -> bool:
    """Equal to rounding (float32, against the largest output), and not because nothing changed."""
    expected, size = case.written_out(op), float(case.plain.abs().max())
    error = float((case.edited(op) - expected).abs().max())
    return error < 1e-5 * size and error < 1e-2 * float((expected - case.plain).abs().max())


def scaled(case: Case) -> bool:
    """`scale` of the map's prompt columns: the output is that of a softmax written out."""
    return exact(case, "scale")


def appended(case: Case) -> bool:
    """`append` of keys and values that are given, in one softmax: likewise."""
    return exact(case, "append")


def detached(case: Case) -> bool:
    """The row beside the edited one is stock to rounding, the next call bit for bit."""
    out, size = case.edited("scale"), float(case.plain.abs().max())
    others = float((out[1:] - case.plain[1:]).abs().max()) < 1e-5 * size
    return others and torch.equal(case.run(), case.plain)


CHECKS = {
    "sites": every_site_once,
    "spans": tokens_found,
    "scale": scaled,
    "append": appended,
    "detach": detached,
}
