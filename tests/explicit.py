"""A joint attention site with a program, and the same computed with every map in full."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import repeat

from inlay_attention import AttnEdits, Key, Probe, Rows, SiteProgram

MATRIX = torch.rand(3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
TEXT, IMAGE, HEADS, WIDTH = 3, 5, 2, 4
TOKENS = TEXT + IMAGE
SPANS = {"text": slice(0, TEXT), "image": slice(TEXT, TOKENS), "all": slice(0, TOKENS)}
ROWS = {"source/text": 1, "edit/null": 1, "edit/text": 2}


def adain(x, y):
    """x with the mean and deviation of y over the tokens, `b h n d`."""
    moments = lambda z: (z.mean(2, keepdim=True), ((z - z.mean(2, keepdim=True)) ** 2).mean(2))  # noqa: E731
    (mx, vx), (my, vy) = moments(x), moments(y)
    return (x - mx) / (vx[:, :, None] + 1e-5).sqrt() * (vy[:, :, None] + 1e-5).sqrt() + my


@dataclass
class Site:
    """A joint site with a program, and the same computed with every map in full."""

    ops: list = field(default_factory=list)  # (op, target, queries, options)
    rows: dict = field(default_factory=lambda: dict(ROWS))
    probes: list = field(default_factory=list)  # (name, branch, read, tokens)
    mask: torch.Tensor | None = None
    kv_heads: int = HEADS
    seed: int = 0

    def __post_init__(self):
        g, n = torch.Generator().manual_seed(self.seed), sum(self.rows.values())
        draw = lambda h: torch.randn(n, h, TOKENS, WIDTH, generator=g, dtype=torch.float64)  # noqa: E731
        self.q, self.k, self.v = draw(HEADS), draw(self.kv_heads), draw(self.kv_heads)
        self.slices = Rows.of(self.rows)
        self.store = {}

    def edits(self):
        allowed = {
            Key(p, op, target, *taken, queries)
            for p, op, target, queries, o in self.named()
            for taken in self.from_of(op, o)
        }
        edits = AttnEdits(frozenset(allowed), "a test", tuple(self.rows))
        for plugin, op, target, queries, options in self.named():
            edits.owner = plugin
            getattr(edits.on(target, queries), op)(**options)
        return edits.by_branch

    def named(self):
        for op, target, queries, options in self.ops:
            options = dict(options)
            yield options.pop("plugin", "p"), op, target, queries, options

    def from_of(self, op, options):
        """(from, how) of what a declaration of this operation says it takes."""
        if op == "route":
            return [(lane, key) for key, lane in options.items() if key in ("qk", "kv")]
        return [(options.get("from_", ""), options.get("how", "join") if op == "append" else "")]

    def program(self):
        named = {key: SPANS[key] for key in ("text", "image")}
        probes = [
            Probe(name, "p", branch, read, frozenset({"s"}), frozenset({0}), tokens)
            for name, branch, read, tokens in self.probes
        ]
        words = {name: tokens for name, _, _, tokens in self.probes}
        spans = lambda q, k: (named, named)  # noqa: E731
        return SiteProgram("s", self.slices, self.edits(), probes, words, spans, self.store)

    def run(self, **extra):
        sdpa = F.scaled_dot_product_attention
        return self.program()(sdpa, self.q, self.k, self.v, self.mask, **extra)

    def explicit(self):
        """Output `R h n d` and per branch the map before `scale`, `b h n m`, all by definition."""
        group = HEADS // self.kv_heads
        k, v = (repeat(x, "b h n d -> b (h g) n d", g=group) for x in (self.k, self.v))
        out, maps = torch.zeros_like(self.q), {}
        for branch, rows in self.slices.items():
            maps[branch] = {}
            for query in range(TOKENS):
                span = "text" if query < TEXT else "image"
                p, o = self._query(k, v, branch, rows, query, span)
                maps[branch][query] = p
                out[rows, :, query] = o
        return out, maps

    def _query(self, k, v, branch, rows, query, span):
        """One query token of one branch: its probabilities `b h m` and output `b h d`."""
        lane, role = branch.split("/")
        acting = [
            (op, options)
            for _, op, target, queries, options in self.named()
            if target in (branch, lane) and queries in ("all", span)
        ]

        def twin(lane):
            there = f"{lane}/{role}"
            return self.slices[there if there in self.slices else f"{lane}/text"]

        def logits_of(keys_from, q, at=slice(None), gain=1.0):
            """Scaled products and mask of the keys of these rows, in full."""
            products = torch.einsum(
                "b h d, b h n d -> b h n", q, k[keys_from][:, :, at].expand(n, -1, -1, -1)
            )
            return products / math.sqrt(WIDTH) * gain

        n = rows.stop - rows.start
        own_q, own_k = self.q[rows], k[rows]
        for op, o in acting:
            if op == "align":
                other, at = twin(o["from_"]), SPANS[o["keys"]]
                own_q, own_k = own_q.clone(), own_k.clone()
                own_q[:, :, at] = adain(own_q[:, :, at], self.q[other][:, :, at])
                own_k[:, :, at] = adain(own_k[:, :, at], k[other][:, :, at])
        routes = {
            how: (twin(o[how]), self._at(o.get("keys", "all")))
            for op, o in acting
            if op == "route"
            for how in ("qk", "kv")
            if how in o
        }
        own_v, mask = v[rows].clone(), self._mask(rows, query).expand(n, 1, TOKENS).clone()
        q = own_q[:, :, query]
        if "qk" in routes:
            q = self.q[routes["qk"][0], :, query].expand(n, -1, -1)
        logits = torch.einsum("b h d, b h n d -> b h n", q, own_k) / math.sqrt(WIDTH)
        if "kv" in routes:
            other, at = routes["kv"]
            own_v[:, :, at] = v[other].expand(n, -1, -1, -1)[:, :, at]
        if routes:
            other, at = routes.get("qk") or routes["kv"]
            logits[..., at] = logits_of(other, q)[..., at]
            mask[..., at] = self._mask(other, query).expand(n, 1, TOKENS)[..., at]
        added, extra_v = [], []
        for op, o in acting:
            if op == "append" and o.get("how") != "side":
                source, at = twin(o["from_"]), SPANS[o["keys"]]
                theirs = logits_of(source, q, at, o.get("gain", 1.0))
                value = v[source][:, :, at].expand(n, -1, -1, -1)
                if o.get("how") == "sum":
                    logits[..., at] = o.get("own", 1.0) * logits[..., at] + theirs
                    own_v[:, :, at] = (
                        o.get("own", 1.0) * own_v[:, :, at] + o.get("gain", 1.0) * value
                    )
                else:
                    added.append(theirs + self._mask(source, query)[..., at])
                    extra_v.append(value)
        for op, o in acting:
            if op == "gain":
                logits[..., self._at(o["keys"])] *= o["gain"]
        logits = logits + mask
        for op, o in acting:
            if op == "bias":
                bias = torch.as_tensor(o["bias"], dtype=torch.float64)
                within = query - SPANS[self._span_of(o, query)].start if bias.dim() == 2 else None
                logits[..., self._at(o["keys"])] += bias if within is None else bias[within]
            if op == "scale" and o.get("renorm"):
                logits[..., self._at(o["keys"])] += math.log(o["weight"])
        p = torch.cat([logits, *added], dim=-1).softmax(-1)
        seen, joined = p[..., :TOKENS].clone(), p[..., TOKENS:]
        for op, o in acting:
            if op == "identity":
                seen = torch.eye(TOKENS, dtype=torch.float64)[query].expand_as(seen).clone()
            if op == "map":
                at = self._at(o["keys"])
                seen[..., at] = seen[..., at] @ o["matrix"]
            if op == "mix":
                at, other = self._at(o["keys"]), twin(o["from_"])
                theirs = logits_of(other, self.q[other, :, query].expand(n, -1, -1))
                theirs = (theirs + self._mask(other, query)).softmax(-1)[..., at]
                theirs = theirs @ o["matrix"] if o.get("matrix") is not None else theirs
                alpha = torch.as_tensor(o["alpha"], dtype=torch.float64)
                seen[..., at] = alpha * theirs + (1 - alpha) * seen[..., at]
        for op, o in acting:
            if op == "scale" and not o.get("renorm"):
                seen[..., self._at(o["keys"])] *= o["weight"]
        values = torch.cat([own_v, *extra_v], dim=2)
        out = torch.einsum("b h m, b h m d -> b h d", torch.cat([seen, joined], -1), values)
        for op, o in acting:
            if op == "append" and o.get("how") == "side":
                source, at = twin(o["from_"]), SPANS[o["keys"]]
                aside = logits_of(source, q, at) + self._mask(source, query)[..., at]
                value = v[source][:, :, at].expand(n, -1, -1, -1)
                aside = torch.einsum("b h m, b h m d -> b h d", aside.softmax(-1), value)
                out = out + o.get("gain", 1.0) * aside
        return p, out

    def _span_of(self, options, query):
        """The span whose first query is row 0 of a bias `n m`."""
        rows = options["bias"].shape[0]
        return "all" if rows == TOKENS else "text" if rows == TEXT else "image"

    def _mask(self, rows, query):
        if self.mask is None:
            return torch.zeros(1, 1, TOKENS, dtype=torch.float64)
        shape = (self.q.shape[0], 1, TOKENS, TOKENS)
        mask = self.mask.expand(*shape)[rows, :, query]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
        return mask

    @staticmethod
    def _at(keys):
        return SPANS[keys] if isinstance(keys, str) else list(keys)
