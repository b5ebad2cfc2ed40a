"""`make docs-pictures`: what plugins do, as rows of small pictures.

The experiments that ship, drawn with and without their plugin or with other options of it; the same
on every machine up to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import inlay
from inlay.cli import insertion
from inlay.cli.experiment import execute
from inlay.cli.run import hush_loading_bars
from inlay.cli.sheet import overlay
from inlay.events import Result
from inlay_config import config
from inlay_config.images import open_image, to_pil, to_tensor, whole
from inlay_toybox import backdrop, world
from inlay_toybox.classes import BY_NAME
from inlay_toybox.quality.exemplars import view

FOLDER = Path(__file__).parent / "pictures"
SIDE, GAP, HEAD, TEXT = 128, 6, 20, 12  # pixels; a toybox picture has 64
Panel = tuple[str, Image.Image]


def drawn(name: str, *overrides: str, plugin: bool = True) -> Result:
    """The experiment of that name, or what it draws without the plugin of that name."""
    experiment = config.load(name, overrides)
    if not plugin:
        del experiment.plugins[name]
    return execute(experiment)


def edit(result: Result) -> Image.Image:
    return to_pil(result.images["edit"])[0]


def reweight() -> list[Panel]:
    """One word, from as it is to pushed away from; and several at once."""
    told = [{"red": 1}, {"red": 0}, {"red": -2}, {"red": 1, "cow": 0}, {"red": -2, "cow": 0}]
    return [
        (
            ", ".join(f"{word} x {weight}" for word, weight in words.items()),
            edit(drawn("reweight", *(f"plugins.reweight.words.{k}={w}" for k, w in words.items()))),
        )
        for words in told
    ]


def pag() -> list[Panel]:
    scales = {s: f"plugins.pag.scale={s}" for s in (0.0, 1.5, 3.0)}
    return [(f"scale {s:g}", edit(drawn("pag", said))) for s, said in scales.items()]


def mutual_self_attention() -> list[Panel]:
    made = drawn("mutual_self_attention")
    plain = drawn("mutual_self_attention", plugin=False)
    panels = [("source", to_pil(made.images["source"])[0])]
    return [*panels, ("edit without", edit(plain)), ("edit with", edit(made))]


def shared_attention() -> list[Panel]:
    made, plain = drawn("shared_attention"), drawn("shared_attention", plugin=False)
    panels = [("reference", to_pil(made.images["reference"])[0])]
    panels += [("without", picture) for picture in to_pil(plain.images["edit"])[:3]]
    return panels + [("with", picture) for picture in to_pil(made.images["edit"])[:3]]


def regional_prompts() -> list[Panel]:
    made, plain = drawn("regional_prompts"), drawn("regional_prompts", plugin=False)
    return [("without", edit(plain)), ("cow left, house right", edit(made))]


def attention_maps() -> list[Panel]:
    made = drawn("attention_maps")
    maps = [(title, to_pil(heat)[0]) for title, heat in made.board.of("map")]
    return [("edit", edit(made)), *((title, overlay(heat, edit(made))) for title, heat in maps)]


def strokes() -> Image.Image:
    """What a hand paints in a few strokes: a sky, a road, a block of red."""
    paper = Image.new("RGB", (64, 64), "#86b6ee")
    pen = ImageDraw.Draw(paper)
    pen.rectangle((0, 33, 63, 63), fill="#5f9140")
    pen.rectangle((0, 38, 63, 58), fill="#6a6a6e")
    pen.rectangle((34, 27, 56, 45), fill="#c03a35")
    return paper


def sdedit() -> list[Panel]:
    """Strokes, less and less of them kept."""
    with TemporaryDirectory() as folder:
        strokes().save(painted := Path(folder, "strokes.png"))
        said = [f"input.image={painted}", "prompt.edit=a red bus on the road", "seed=0"]
        made = {s: drawn("sdedit", *said, f"plugins.sdedit.strength={s}") for s in STRENGTHS}
    panels = [("strokes", strokes())]
    return panels + [(f"strength {s:g}", edit(result)) for s, result in made.items()]


def flow_edit() -> list[Panel]:
    """The steps that are made: more of them, more of the prompt."""
    shares = (0.5, 0.7, 0.86)
    made = {n: drawn("flow_edit", f"plugins.flow_edit.n_max={n}") for n in shares}
    panels = [("source", to_pil(made[0.5].images["source"])[0])]
    return panels + [(f"n_max {n:g}", edit(result)) for n, result in made.items()]


def rf_inversion() -> list[Panel]:
    """How far each early step goes back to the picture."""
    made = {e: drawn("rf_inversion", f"plugins.rf_inversion.eta={e}") for e in (0.0, 0.5, 0.9)}
    panels = [("source", to_pil(made[0.9].images["source"])[0])]
    return panels + [(f"eta {e:g}", edit(result)) for e, result in made.items()]


def candidates(name: str, shown: int = 3, *overrides: str) -> list[Panel]:
    """The source and the best of what was drawn, the best first."""
    made = drawn(name, "seed=1", *overrides)
    panels = [("source", to_pil(made.images["source"])[0])]
    scores = made.board["rank:scores"].tolist()
    pictures = to_pil(made.images["edit"])[:shown]
    return panels + [(f"distance {d:.2f}", p) for d, p in zip(scores, pictures, strict=False)]


def add() -> list[Panel]:
    return candidates("blended/add")


def replace() -> list[Panel]:
    return candidates("blended/replace")


def remove() -> list[Panel]:
    return candidates("blended/remove")


def background() -> list[Panel]:
    return candidates("blended/background")


def alter() -> list[Panel]:
    """The picture, and the object in another colour."""
    with TemporaryDirectory() as folder:
        toy("a red bus on the road").save(path := Path(folder, "bus.png"))
        return candidates("blended/alter", 3, f"input.image={path}")


def several() -> list[Panel]:
    return candidates("blended/candidates", 8)


def latent_optimisation() -> list[Panel]:
    return candidates("latent_optimisation")


def toy(caption: str, without: bool = False) -> Image.Image:
    """A picture of the toybox world, or of the place without its first object."""
    scene = next(s for s in map(world.sample, range(3000)) if s.caption == caption)
    return to_pil(to_tensor(world.render(scene.without(0) if without else scene, 64).image))[0]


def cut_out() -> Image.Image:
    """A bus on grey, as CLIP sees what is inside a mask."""
    scene = world.views("bus", 1, 9, colour="red")[0]
    drawn = world.render(scene)
    grey = np.where(drawn.masks[0][..., None], drawn.image, 128).astype(np.uint8)
    left, top, right, _ = (int(side) for side in drawn.boxes[0])
    side = right - left + 6
    square = (left - 3, top - 6, left - 3 + side, top - 6 + side)
    return Image.fromarray(grey).crop(square).resize((64, 64), Image.Resampling.BICUBIC)


def image_guided() -> list[Panel]:
    """A picture in a prompt's place."""
    with TemporaryDirectory() as folder:
        cut_out().save(reference := Path(folder, "bus.png"))
        toy("a cow on the grass", without=True).save(place := Path(folder, "grass.png"))
        images = f"plugins.clip_guidance.images=[{reference}]"
        made = drawn("blended_image_guided", f"input.image={place}", images)
    panels = [("guide", cut_out()), ("source", to_pil(made.images["source"])[0])]
    scores = made.board["rank:scores"].tolist()
    best = zip(scores, to_pil(made.images["edit"])[:2], strict=False)
    return panels + [(f"distance {d:.2f}", picture) for d, picture in best]


def inpaint() -> list[Panel]:
    """Half an object is drawn anew."""
    picture = toy("a cow on the grass")
    with TemporaryDirectory() as folder:
        picture.save(path := Path(folder, "cow.png"))
        said = ("plugins.region.box=[0.5,0.5,0.75,1.0]", "seed=1", "n=2")
        made = drawn("blended/inpaint", f"input.image={path}", *said)
    hole = overlay(to_pil(made.board["mask:region"])[0], picture)
    shown = [("filled", filled) for filled in to_pil(made.images["edit"])]
    return [("picture", picture), ("hole", hole), *shown]


def scribble() -> list[Panel]:
    """What is drawn into the picture, and what becomes of it."""
    made = drawn("blended/scribble", "n=2")
    panels = [(k, to_pil(made.images[k])[0]) for k in ("source", "scribble")]
    return panels + [("edit", picture) for picture in to_pil(made.images["edit"])]


def piece() -> list[Panel]:
    """A piece of another picture, and what becomes of it."""
    other = Image.fromarray(world.render(world.views("bus", 1, 9, colour="red")[0], 64).image)
    with TemporaryDirectory() as folder:
        other.save(path := Path(folder, "other.png"))
        said = [f"plugins.scribble.picture={path}", "plugins.scribble.cut=[0.16,0.47,0.63,0.87]"]
        made = drawn("blended_piece", "n=2", "plugins.region.box=[0.2,0.4,0.7,0.83]", *said)
    panels = [("other picture", other), ("pasted", to_pil(made.images["scribble"])[0])]
    return panels + [("edit", picture) for picture in to_pil(made.images["edit"])]


def scene(name: str) -> list[Panel]:
    """The picture before, and the one that is taken after each edit."""
    with TemporaryDirectory() as folder:
        told = insertion.play(name, [], Path(folder), quiet=True)
        done = [insertion.Done(**each) for each in told["done"]]
        files = [("source", done[0].before), *((d.subject, d.pictures[d.taken]) for d in done)]
        return [(title, open_image(Path(folder, file))) for title, file in files]


def chain() -> list[Panel]:
    return scene("blended_chain")


def extrapolation() -> list[Panel]:
    return scene("extrapolation")[1:]


def algorithms() -> list[Panel]:
    """Blended Diffusion's second and first, without a prompt in the model."""
    second = candidates("blended_diffusion", 2)
    return second + candidates("local_clip_guidance", 2)[1:]


STRENGTHS = (0.5, 0.6, 0.7, 0.8)
OFF = (
    "plugins.prompt_to_prompt.edit=refine",
    "plugins.prompt_to_prompt.cross_replace=0.0",
    "plugins.prompt_to_prompt.self_replace=0.0",
)


UNGUIDED = "plugins.clip_guidance.active=-1"
EVERYWHERE = "plugins.local_blend.threshold=-1.0"


def words(name: str) -> list[Panel]:
    """Source, edit by the prompt and the source's noise alone, and the experiment."""
    made, plain = drawn(name), drawn(name, *OFF)
    panels = [("source", to_pil(made.images["source"])[0]), ("prompt alone", edit(plain))]
    return [*panels, (name.removeprefix("p2p_"), edit(made))]


def replace_word() -> list[Panel]:
    return words("p2p_replace")


def refine() -> list[Panel]:
    return words("p2p_refine")


def weigh() -> list[Panel]:
    made = drawn("p2p_reweight")
    return [("source", to_pil(made.images["source"])[0]), ("sunset x -2", edit(made))]


def only_there() -> list[Panel]:
    made, everywhere = (drawn("p2p_local_blend", *said) for said in ((), (EVERYWHERE,)))
    panels = [("source", to_pil(made.images["source"])[0]), ("replace", edit(everywhere))]
    return [
        *panels,
        ("local blend", edit(made)),
        ("mask", to_pil(made.board["mask:local_blend"])[0]),
    ]


def injection() -> list[Panel]:
    made, plain = drawn("p2p_flux"), drawn("p2p_flux", "plugins.attention_injection.active=-1")
    panels = [("source", to_pil(made.images["source"])[0]), ("prompt alone", edit(plain))]
    return [*panels, ("injection", edit(made))]


def inversions() -> list[Panel]:
    """A picture of the toybox world, and its edits."""
    scene = next(s for s in map(world.sample, range(1000)) if s.caption == "a red bus on the road")
    panels = [("picture", to_pil(to_tensor(world.render(scene, 64).image))[0])]
    with TemporaryDirectory() as folder:
        panels[0][1].save(path := Path(folder) / "bus.png")
        for method in ("null_text", "negative_prompt", "direct"):
            said = f"input.image={path}", f"plugins.null_text.method={method}"
            panels.append((method, edit(drawn("p2p_null_text", *said))))
    return panels


def words_in_a_box() -> list[Panel]:
    """Prompt-to-Prompt alone, blending alone, and both."""
    made = {
        "Prompt-to-Prompt": drawn("p2p_blending", "plugins.latent_blend=null"),
        "blending": drawn("p2p_blending", *OFF),
        "both": drawn("p2p_blending"),
    }
    source = to_pil(made["both"].images["source"])[0]
    return [("source", source), *((title, edit(result)) for title, result in made.items())]


def guided_addit() -> list[Panel]:
    """Add-it alone, and with CLIP's gradient in the mask that it finds."""
    made, plain = drawn("clip_guided_addit"), drawn("clip_guided_addit", UNGUIDED)
    panels = [("source", to_pil(made.images["source"])[0]), ("Add-it", edit(plain))]
    mask = to_pil(made.board["mask:subject"])[0]
    return [*panels, ("its mask", mask), ("and CLIP guidance", edit(made))]


def exemplar_attention() -> list[Panel]:
    """Two exemplars, and what is drawn into an empty meadow without and with a look at them."""
    meadow = next(s for s in map(world.sample, range(1000)) if s.ground == "grass" and not s.sunset)
    meadow, panels = dataclasses.replace(meadow, things=()), list[Panel]()
    with TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.png" for name in ("image", "mask", "exemplar")}
        Image.fromarray(world.render(meadow, 64).image).save(files["image"])
        mask = Image.new("L", (64, 64))
        mask.paste(255, (12, 18, 52, 56))
        mask.save(files["mask"])
        said = [f"input.{name}={files[name]}" for name in ("image", "mask")]
        said.append(f"plugins.exemplar_attention.image={files['exemplar']}")
        for colour in ("red", "green"):
            bus = world.Thing("bus", colour, 0.5, 0.93, 0.86)
            shown = Image.fromarray(
                world.render(dataclasses.replace(meadow, things=(bus,)), 64).image
            )
            shown.save(files["exemplar"])
            if not panels:
                plain = drawn("exemplar_attention", *said, plugin=False)
                panels.append(("prompt alone", edit(plain)))
            made = edit(drawn("exemplar_attention", *said))
            panels += [("exemplar", shown), ("looked at", made)]
    return panels


def crop_and_zoom() -> list[Panel]:
    """A mask of four latent cells a side in a large picture, filled by toybox/paint-by-example."""
    rng = np.random.default_rng(3)
    meadow = world.Scene("grass", False, backdrop.Look.draw(rng, "grass"))
    house = world.place(rng, meadow, BY_NAME["house"])
    assert house is not None
    meadow = dataclasses.replace(meadow, things=(house,))
    picture = Image.fromarray(world.render(meadow, 192).image)
    shown, _ = view(world.Thing("cow", None, 0.5, 0.8, 0.4), "grass", rng, SIDE)
    mask = Image.new("L", picture.size)
    mask.paste(255, (130, 86, 178, 128))
    framed = picture.copy()
    ImageDraw.Draw(framed).rectangle((130, 86, 177, 127), outline="white", width=2)
    panels = [("picture and mask", framed), ("exemplar", shown)]
    with TemporaryDirectory() as folder:
        shown.save(path := Path(folder) / "exemplar.png")
        for title, first in (("as it is", {}), ("enlarged", {"crop_and_zoom": {"margin": 0.4}})):
            plugins = {**first, "exemplar": {"image": str(path)}}
            plugins |= {} if first else {"paste_back": {"mask": "mask:user", "feather": 4}}
            session = inlay.Session("toybox/paint-by-example", plugins)
            asked = {"guidance": 3.0, "seed": 1, "size": 64, "steps": 20}
            panels.append((title, edit(session.run(image=picture, mask=mask, **asked))))
    return [(title, p.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for title, p in panels]


FIGURES: dict[str, tuple[Callable[[], list[Panel]], ...]] = {
    "attention": (
        reweight, pag, mutual_self_attention, shared_attention, regional_prompts, attention_maps,
    ),
    "blended": (
        add, replace, alter, remove, background, several, scribble, piece, inpaint, extrapolation,
        chain, algorithms, image_guided, latent_optimisation,
    ),
    "exemplars": (exemplar_attention, crop_and_zoom),
    "edits": (sdedit, flow_edit, rf_inversion),
    "together": (guided_addit, words_in_a_box),
    "words": (replace_word, refine, weigh, only_there, injection, inversions),
}  # fmt: skip


def row(panels: list[Panel]) -> Image.Image:
    """Panels side by side, their titles above; toybox pixels stay squares."""
    widths = [SIDE * picture.width // picture.height for _, picture in panels]
    sheet = Image.new("RGB", (sum(widths) + GAP * (len(panels) - 1), HEAD + SIDE), "white")
    pen, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT), 0
    for (title, picture), width in zip(panels, widths, strict=True):
        pen.text((left, 2), title, fill="#222222", font=font)
        sheet.paste(picture.resize((width, SIDE), Image.Resampling.NEAREST), (left, HEAD))
        left += width + GAP
    return sheet


if __name__ == "__main__":
    hush_loading_bars()
    for folder, figures in FIGURES.items():
        for figure in figures:
            with whole(FOLDER / folder / f"{figure.__name__}.webp") as partial:
                row(figure()).save(partial, "WEBP", quality=90, method=6)
