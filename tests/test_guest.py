"""Guest mode: plugins inside unmodified calls of stock pipelines, and what a session says of it."""

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import inlay
from folders import save_flux
from guests import MASK, PICTURE, SEED, STEPS, STOCK
from inlay import ConfigError, InputError, ModelError, PlanConflict, PluginError, backbones
from inlay_plugins.attention_maps import AttentionMaps
from inlay_plugins.latent_blend import LatentBlend
from inlay_plugins.paste_back import PasteBack
from inlay_plugins.reweight import Reweight
from models import conds, pixel
from spies import Editor, Spy, plugin

SESSIONS = {"sd": {"guidance": 3.0}, "sdxl": {"guidance": 3.0}, "sd3": {"guidance": 3.0},
            "flux": {"true_cfg": 2.0}}  # fmt: skip


@pytest.fixture(scope="module")
def pipes():
    return {name: stock.pipe() for name, stock in STOCK.items()}


@pytest.fixture(scope="module")
def plain(pipes):
    """Pictures of the stock calls."""
    return {name: STOCK[name].call(pipe) for name, pipe in pipes.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A FLUX with tokenizers and text encoders, and the options of its call."""
    folder = save_flux(tmp_path_factory.mktemp("model") / "flux")
    pipe = inlay.Session(str(folder), device="cpu").backbone.pipe
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": STEPS, "max_sequence_length": 32}
    return pipe, options


def seeded(output_type="pt"):
    return {"generator": torch.Generator().manual_seed(SEED), "output_type": output_type}


@pytest.fixture(autouse=True)
def everything_is_left_as_it_was(pipes):
    before = [traces(pipe) for pipe in pipes.values()]
    stock = F.scaled_dot_product_attention
    yield
    assert [traces(pipe) for pipe in pipes.values()] == before
    assert F.scaled_dot_product_attention is stock


def traces(pipe):
    """Methods on instances, and hooks, that a guest could leave behind."""
    owners = (pipe, pipe.scheduler, pipe.image_processor)
    methods = [{n for n, v in vars(owner).items() if callable(v)} for owner in owners]
    model = getattr(pipe, "transformer", None) or pipe.unet
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return methods, hooks, len(model._forward_hooks_always_called)


def louder(**options):
    """Twice the attention to the prompt."""
    select = {"kind": ["cross", "joint"]}
    return Editor(op="scale", options={"keys": "text", "weight": 2.0}, select=select, **options)


def called(pipes, name, plugins, **options):
    pipe = pipes[name]
    with inlay.attach(pipe, plugins) as guest:
        pictures = STOCK[name].call(pipe, **options)
    return pictures, guest


def session(pipes, name, plugins, **options):
    given = {"conds": conds(), "steps": STEPS, "seed": SEED, **SESSIONS[name], **options}
    return inlay.Session(pipes[name], plugins).run(**given)


# identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_a_guest_without_plugins_moves_no_bit(pipes, plain, name):
    spy = Spy()
    pictures, _ = called(pipes, name, {"spy": plugin(observe=lambda step: spy.log.append(step.t))})
    assert torch.equal(pictures, plain[name]) and len(spy.log) >= 2


@pytest.mark.parametrize("name", STOCK)
def test_an_edit_acts_and_is_gone_afterwards(pipes, plain, name):
    pictures, guest = called(pipes, name, {"louder": louder()})
    assert not torch.allclose(pictures, plain[name], atol=1e-5)
    assert guest.plan.sites and guest.plan.request.steps in (2, STEPS)
    assert torch.equal(STOCK[name].call(pipes[name]), plain[name])


@pytest.mark.parametrize("name", SESSIONS)
def test_an_edit_is_the_session_s_bit_for_bit(pipes, name):
    pictures, guest = called(pipes, name, {"louder": louder(active=[0, 1])})
    ours = session(pipes, name, {"louder": louder(active=[0, 1])})
    assert torch.equal(guest.result.latents["edit"], ours.latents["edit"])
    assert torch.equal(pictures, ours.images["edit"])


def test_several_pictures_of_a_prompt_are_rows_of_one_branch(pipes, written):
    edit = {"louder": louder(target="edit/text")}
    two, guest = called(pipes, "sd", edit, num_images_per_prompt=2)
    assert guest.plan.request.n == 2 and two.shape[0] == 2
    assert torch.equal(two, session(pipes, "sd", edit, n=2).images["edit"])
    pipe, options = written
    with inlay.attach(pipe, edit):
        made = pipe("a dog", num_images_per_prompt=2, **options | seeded()).images
    ours = inlay.Session(pipe, edit).run("a dog", n=2, steps=STEPS, seed=SEED)
    assert torch.equal(made, ours.images["edit"])


def test_branches_are_edited_one_by_one(pipes, plain):
    """Null and text rows are told apart in one batch (sd) and in two calls (flux)."""
    for name in ("sd", "flux"):
        made = [
            called(pipes, name, {"e": louder(target=target)})[0]
            for target in ("edit/null", "edit/text", "edit")
        ]
        ours = [
            session(pipes, name, {"e": louder(target=target)}).images["edit"]
            for target in ("edit/null", "edit/text", "edit")
        ]
        assert all(torch.equal(a, b) for a, b in zip(made, ours, strict=True))
        assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], plain[name])


# rows that cannot be told apart ---------------------------------------------------------------


def test_equal_prompts_cannot_be_told_apart(pipes):
    same = {"negative_prompt_embeds": conds()["edit"]["embeds"]}
    with pytest.raises(ModelError, match="rows: edit/text and edit/null have the same embedding"):
        called(pipes, "sd", {"louder": louder()}, **same)
    called(pipes, "sd", {}, **same)  # nobody asks whose they are


def test_embeddings_that_the_call_changes_are_not_recognised(pipes):
    def change(pipe, step, t, given):
        return {"prompt_embeds": given["prompt_embeds"] * 1.5}

    options = {"callback_on_step_end": change}
    options["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    with pytest.raises(ModelError, match="rows: no argument of this call holds the embeddings"):
        called(pipes, "sd", {"louder": louder()}, **options)


# words ----------------------------------------------------------------------------------------


def test_words_are_found_with_the_pipeline_s_own_tokenizer(written):
    pipe, options = written
    weigh = {"reweight": Reweight(Reweight.Config(words={"dog": 3.0}))}
    with inlay.attach(pipe, weigh) as guest:
        made = pipe("a dog on a road", **options | seeded())
    ours = inlay.Session(pipe, weigh).run("a dog on a road", steps=STEPS, seed=SEED)
    assert torch.equal(made.images, ours.images["edit"])
    assert guest.plan.request.prompt["edit"] == "a dog on a road"


def test_words_are_weighed_on_a_unet_too():
    pipe = backbones.load(inlay.resolve_model("toybox/sd"), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    weigh = {"reweight": {"words": {"kite": 3.0}}}
    asked = {"guidance_scale": 3.0, "height": 64, "width": 64, "num_inference_steps": STEPS}
    with inlay.attach(pipe, weigh) as guest:
        pipe("a kite in the sky", negative_prompt="a cow", **asked | seeded("latent"))
    prompt = {"edit": "a kite in the sky", "negative": "a cow"}
    ours = inlay.Session(pipe, weigh).run(prompt, guidance=3.0, size=64, steps=STEPS, seed=SEED)
    assert torch.equal(guest.result.latents["edit"], ours.latents["edit"])


def test_maps_of_words_are_on_the_board(written):
    pipe, options = written
    maps = {"maps": AttentionMaps(AttentionMaps.Config(words=["dog"], steps=[1]))}
    with inlay.attach(pipe, maps) as guest:
        pipe("a dog", **options | seeded())
    board = inlay.Session(pipe, maps).run("a dog", steps=STEPS, seed=SEED).board
    for key in ("map:dog", "map:dog at 1"):
        assert torch.equal(guest.board[key], board[key]) and guest.board[key].max() == 1
    with inlay.attach(pipe, maps) as guest:  # latents are no pictures, and final still comes
        pipe("a dog", **options | seeded("latent"))
    assert torch.equal(guest.board["map:dog"], board["map:dog"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a cat", "'dog' is not in the prompt"), (["a dog", "dogs"], "and the call has several")],
)
def test_words_that_cannot_be_found_are_named(written, prompt, message):
    pipe, options = written
    with (
        inlay.attach(pipe, {"reweight": {"words": {"dog": 2.0}}}),
        pytest.raises(InputError, match=message),
    ):
        pipe(prompt, **options)


def test_words_of_embeddings_cannot_be_found(pipes):
    with pytest.raises(InputError, match="prompt: 'dog' cannot be found: the call was given"):
        called(pipes, "sd", {"reweight": {"words": {"dog": 2.0}}})


# events ---------------------------------------------------------------------------------------


def test_a_clean_estimate_that_is_written_is_stepped(pipes):
    def clamp(step):
        step.x0["edit"] = step.x0["edit"].clamp(-0.5, 0.5)

    for name in ("sd", "flux"):
        made, _ = called(pipes, name, {"clamp": plugin(denoised=clamp)})
        ours = session(pipes, name, {"clamp": plugin(denoised=clamp)}).images["edit"]
        torch.testing.assert_close(made, ours, rtol=1e-5, atol=1e-5)


def test_latents_are_folded_after_a_step_and_before_the_next(pipes):
    def halve(step):
        step.x_next["edit"] = step.x_next["edit"] / 2

    def restart(run, step):
        if step.index == 1:
            noise = run.noise("restart", step.x["edit"].shape)
            step.x["edit"] = step.frame.noise(torch.zeros_like(noise), noise)

    for name in ("sd", "flux", "sd3"):
        folds = {"halve": plugin(post_step=halve), "restart": plugin(pre_step=restart)}
        with inlay.attach(pipes[name], folds, seed=SEED):
            made = STOCK[name].call(pipes[name])
        assert torch.equal(made, session(pipes, name, folds).images["edit"])


@pytest.mark.parametrize("what", ["reads", "writes"])
def test_there_are_no_latents_before_the_first_step(pipes, what):
    def act(step):
        step.x["edit"] = torch.zeros(1) if what == "writes" else step.x["edit"]

    with pytest.raises(PluginError, match=f"step 0: early {what} latents before the first step"):
        called(pipes, "sd", {"early": plugin(pre_step=act)})


def test_observers_see_the_call_as_it_is(pipes):
    seen = []

    def watch(run, step):
        known = torch.equal(step.frame.x0(step.output["edit"], step.x["edit"]), step.x0["edit"])
        seen.append((step.index, step.total, step.eval, float(step.t), known, *step.lanes))

    called(pipes, "img2img", {"watch": plugin(observe=watch)})
    times = pipes["img2img"].scheduler.timesteps[-2:].tolist()
    assert seen == [(i, 2, i, t, True, "edit") for i, t in enumerate(times)]


def test_a_blended_latent_is_the_session_s(pipes):
    clean = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def publish(need):
        need.publish("trajectory:source")

    def trajectory(run):
        noise = run.noise("source", clean.shape)
        run.board["trajectory:source"] = lambda step, ahead: step.frame_at(step.eval + ahead).noise(
            clean, noise
        )

    def plugins():
        cfg = LatentBlend.Config(steps=[0, 2], mask="mask:user")
        source = plugin(declare=publish, prepare=trajectory)
        return {"source": source, "blend": LatentBlend(cfg)}

    with inlay.attach(pipes["sd"], plugins(), seed=SEED, mask=MASK) as guest:
        made = STOCK["sd"].call(pipes["sd"])
    ours = session(pipes, "sd", plugins(), mask=MASK)
    assert torch.equal(made, ours.images["edit"])
    outside = guest.result.latents["edit"][..., :3]
    torch.testing.assert_close(outside, clean[..., :3], rtol=0, atol=0.3)


@pytest.mark.parametrize("form", ["pt", "np", "pil"])
def test_pictures_are_composed_in_the_form_that_is_asked_for(pipes, plain, form):
    paste = {"paste": PasteBack(PasteBack.Config(mask="mask:user", feather=0))}
    with inlay.attach(pipes["sd"], paste, image=PICTURE, mask=MASK):
        made = STOCK["sd"].call(pipes["sd"], output_type=form)
    if form == "pil":
        assert isinstance(made[0], Image.Image)
        made = torch.frombuffer(bytearray(made[0].tobytes()), dtype=torch.uint8) / 255
        made = made.reshape(1, 32, 32, 3).permute(0, 3, 1, 2)
    made = torch.as_tensor(made).permute(0, 3, 1, 2) if form == "np" else made
    expected = torch.where(MASK > 0, plain["sd"], PICTURE)
    torch.testing.assert_close(made, expected, rtol=0, atol=1 / 255 if form == "pil" else 1e-6)


def test_the_safety_checker_s_pictures_are_not_composed(pipes):
    pipe, times = pipes["sd"], []

    def check(image, device, dtype):
        pipe.image_processor.postprocess(image, output_type="pil")
        return image, None

    pipe.run_safety_checker = check
    try:
        called(pipes, "sd", {"count": plugin(final=lambda result: times.append(1))})
        assert times == [1] and pipe.run_safety_checker is check
    finally:
        del pipe.run_safety_checker


def test_the_picture_that_is_referred_to_is_not_the_picture(pipes):
    """FLUX.1 Kontext has the tokens of both behind each other."""
    shapes = []

    def declare(need):
        need.probe("first", "edit/text", (0,), need.select())

    def post_step(step):
        shapes.extend(read.shape for read in step.probes["first"].values())

    watch = plugin(declare=declare, post_step=post_step)
    _, guest = called(pipes, "kontext", {"watch": watch})
    assert guest.backbone.packed == 128 and set(shapes) == {(1, 64, 1)}


@pytest.mark.parametrize(
    "solver", ["HeunDiscrete", "PNDM", "EulerAncestralDiscrete", "UniPCMultistep"]
)
def test_evaluations_are_the_session_s_under_every_solver(solver):
    pipe, seen = STOCK["sd"].pipe(), ([], [])
    pipe.scheduler = getattr(diffusers, f"{solver}Scheduler").from_config(pipe.scheduler.config)

    def plugins(log):
        def watch(step):
            log.append((step.index, step.eval, step.last_eval, float(step.t), step.frame.sigma))

        return {"watch": plugin(observe=watch), "louder": louder(active=[1, 2])}

    with inlay.attach(pipe, plugins(seen[0])):
        made = STOCK["sd"].call(pipe, num_inference_steps=5)
    run = inlay.Session(pipe, plugins(seen[1])).run
    ours = run(conds=conds(), steps=5, seed=SEED, guidance=3.0)
    assert torch.equal(made, ours.images["edit"]) and seen[0] == seen[1]


def test_a_model_without_prompts_is_one_branch():
    pipe, finals = pixel(), []
    pipe.set_progress_bar_config(disable=True)

    def call():
        generator = torch.Generator().manual_seed(SEED)
        return pipe(generator=generator, num_inference_steps=STEPS, output_type="np").images

    plain = call()
    end = plugin(final=lambda result: finals.append(list(result.images)))
    with inlay.attach(pipe, {"edit": Editor(active=[0]), "end": end}) as guest:
        made = call()
    assert (made != plain).any() and (call() == plain).all()
    assert finals == [[]] and guest.result.latents["edit"].shape == (1, 3, 16, 16)


# what is refused before the call --------------------------------------------------------------


def lane(need):
    need.lane("source", prompt="source")


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (plugin(declare=lane), "p needs the lane 'source'"),
        (plugin(declare=lambda need: need.pass_("before")), "p needs the pass 'before'"),
        (
            plugin(declare=lambda need: need.branch("edit", "more")),
            "p needs the branch 'edit/more'",
        ),
        (plugin(declare=lambda need: need.evaluations(2)), "p needs evaluations of its own"),
        (plugin(declare=lambda need: need.grad("edit")), "p needs the gradient of lane 'edit'"),
        (plugin(objective=lambda step: None), "p acts in inlay_objective"),
        (plugin(inputs=lambda kwargs: None), "p acts in inlay_inputs"),
        (plugin(combine=lambda text: text), "p acts in inlay_combine"),
        (plugin(begin=lambda x: None), "p acts in inlay_begin"),
    ],
)
def test_what_only_a_session_can_do_is_refused(pipes, made, message):
    for name in ("sd", "aura_flow"):
        with pytest.raises(PlanConflict, match=rf"plugins\.p: {message}.* Use Session\.run\."):
            inlay.attach(pipes[name], {"p": made})


@pytest.mark.parametrize("name", ["pag", "source_trajectory"])
def test_first_party_plugins_that_need_more_are_refused_by_name(pipes, name):
    with pytest.raises(PlanConflict, match=rf"plugins\.{name}: {name} needs the (branch|pass)"):
        inlay.attach(pipes["sd"], {name: {}})


def test_conflicts_and_rules_are_a_session_s(pipes):
    two = {"a": Editor(op="identity", options={}), "b": louder()}
    with pytest.raises(PlanConflict, match=r"a \(identity\) and b \(gain\) meet"):
        inlay.attach(pipes["sd"], {**two, "b": Editor()})
    rule = [{"site": "*", "winner": "a"}]
    with inlay.attach(pipes["sd"], {**two, "b": Editor()}, resolve=rule) as guest:
        assert "conflicts: " in str(guest.plan)


def test_a_window_outside_the_call_is_refused(pipes):
    late, forwards = {"louder": louder(active=inlay.Window(2, 7))}, []
    with pytest.raises(ConfigError, match=r"plugins\.louder: steps 2\.\.7 are outside a run of 3"):
        inlay.attach(pipes["sd"], late, steps=3)
    hook = pipes["sd"].unet.conv_in.register_forward_hook(lambda *_: forwards.append(1))
    try:
        with pytest.raises(ConfigError, match=r"steps 2\.\.7 are outside a run of 3"):
            called(pipes, "sd", late)
    finally:
        hook.remove()
    assert not forwards


def test_a_pipeline_without_a_denoiser_is_refused(pipes):
    class Nothing:
        scheduler = pipes["sd"].scheduler

    with pytest.raises(ModelError, match="model: Nothing has no denoiser"):
        inlay.attach(Nothing(), {})


# attaching and detaching ----------------------------------------------------------------------


def test_the_plan_can_be_printed_before_the_call(pipes):
    with inlay.attach(pipes["flux"], {"louder": louder()}, steps=STEPS) as guest:
        assert "louder: scale on edit, 4 sites, steps 0-2" in str(guest.plan)


def test_a_guest_stays_for_several_calls(pipes, plain):
    once, _ = called(pipes, "flux", {"louder": louder()})
    with inlay.attach(pipes["flux"], {"louder": louder()}) as guest:
        first = STOCK["flux"].call(pipes["flux"])
        other = STOCK["flux"].call(pipes["flux"], num_inference_steps=2, true_cfg_scale=1.0)
        assert guest.plan.request.steps == 2 and "edit/null" not in str(guest.plan)
        again = STOCK["flux"].call(pipes["flux"])
    assert torch.equal(first, once) and torch.equal(again, once) and not torch.equal(other, once)


def test_a_model_that_is_tried_is_tried_again_at_another_size(pipes):
    small = {"height": 16, "width": 24}
    alone = [called(pipes, "aura_flow", {"e": louder()}, **size)[0] for size in ({}, small, {})]
    with inlay.attach(pipes["aura_flow"], {"e": louder()}) as guest:
        made = [STOCK["aura_flow"].call(pipes["aura_flow"], **size) for size in ({}, small)]
        assert guest.backbone.grid((16, 24)) == (4, 6)
        made.append(STOCK["aura_flow"].call(pipes["aura_flow"]))
    assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_guests_are_detached_in_any_order(pipes, plain, order):
    def halve(step):
        step.x_next["edit"] = step.x_next["edit"] / 2

    pipe = pipes["sd"]
    lists = {"louder": louder()}, {"halve": plugin(post_step=halve)}
    both, _ = called(pipes, "sd", {**lists[0], **lists[1]})
    alone = [called(pipes, "sd", listed)[0] for listed in lists]
    guests = [inlay.attach(pipe, listed) for listed in lists]
    assert torch.equal(STOCK["sd"].call(pipe), both)
    guests[order[0]].detach()
    assert torch.equal(STOCK["sd"].call(pipe), alone[order[1]])
    guests[order[1]].detach()
    guests[order[1]].detach()
    assert torch.equal(STOCK["sd"].call(pipe), plain["sd"])


def test_two_guests_that_edit_one_model_are_refused(pipes, plain):
    with inlay.attach(pipes["sd"], {"a": louder()}):
        with pytest.raises(PlanConflict, match="UNet2DConditionModel: two guests edit its attent"):
            inlay.attach(pipes["img2img"].__class__(**parts(pipes["sd"])), {"b": louder()})
        with inlay.attach(pipes["flux"], {"b": louder()}):
            STOCK["flux"].call(pipes["flux"])
    assert torch.equal(STOCK["sd"].call(pipes["sd"]), plain["sd"])


def parts(pipe):
    """What another pipeline of the same model is made of, with a scheduler of its own."""
    made = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    return {**made, "scheduler": copy.deepcopy(pipe.scheduler), "requires_safety_checker": False}


@pytest.mark.parametrize("event", ["post_step", "attention", "final"])
def test_everything_is_restored_after_an_exception(pipes, plain, event):
    def fail():
        raise ValueError("a plugin's mistake")

    def declare(need):
        need.edit("gain", "edit", need.select())

    with pytest.raises(ValueError, match="a plugin's mistake"):
        called(pipes, "sd", {"fail": plugin(**{"declare": declare, event: fail})})
    assert traces(pipes["sd"]) == traces(STOCK["sd"].pipe())
    assert torch.equal(STOCK["sd"].call(pipes["sd"]), plain["sd"])


def test_a_session_of_the_same_pipeline_is_left_alone(pipes):
    alone = session(pipes, "sd", {}).latents["edit"]
    with inlay.attach(pipes["sd"], {"louder": louder()}) as guest:
        assert torch.equal(session(pipes, "sd", {}).latents["edit"], alone)
        made = STOCK["sd"].call(pipes["sd"])
        assert torch.equal(session(pipes, "sd", {}).latents["edit"], alone)
    assert torch.equal(made, called(pipes, "sd", {"louder": louder()})[0])
    assert guest.result.latents["edit"].shape == alone.shape


def test_another_pipeline_of_the_same_model_is_left_alone(pipes):
    pipe = pipes["sd"]
    other = diffusers.StableDiffusionPipeline(**parts(pipe))
    other.set_progress_bar_config(disable=True)
    stock = STOCK["sd"].call(other)
    with inlay.attach(pipe, {"louder": louder()}):
        made = STOCK["sd"].call(pipe)
        assert torch.equal(STOCK["sd"].call(other), stock)
        assert torch.equal(STOCK["sd"].call(pipe), made)


def test_a_copied_scheduler_is_nobody_s(pipes):
    pipe, seen = pipes["sd"], []
    with inlay.attach(pipe, {"watch": plugin(observe=lambda step: seen.append(step.eval))}):
        own = copy.deepcopy(pipe.scheduler)
        own.set_timesteps(2)
        x = torch.ones(1, 4, 4, 4)
        assert own.step(x, own.timesteps[0], x).prev_sample.shape == x.shape
        assert own.step.__self__ is own and not seen
