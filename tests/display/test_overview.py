"""`summary` and `diff`: their numbers against other counts, their marks and arcs against networks known by hand."""

from __future__ import annotations

import copy
import re
import time
from html.parser import HTMLParser

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

import sparsetweaks as st
from sparsetweaks.display import diff, summary
from sparsetweaks.display.parts import Arc, fold, walk
from sparsetweaks.display.style import ROOT, sheet

SECONDS = 5  # for 500 layers, on a machine that does other things too
BYTES = 1_000_000


def part_at(overview, path):
    return next(part for part in walk(overview.facts.part) if part.path == path)


def marks_at(overview, path):
    return [str(mark) for mark in part_at(overview, path).marks]


def total(overview, label):
    return next(each for each in overview.facts.totals if each.label.startswith(label))


def plain(layers=500):
    channels, modules = 3, []
    for _ in range(layers):
        modules += [nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        channels = 4
    return nn.Sequential(*modules)


class Functional(nn.Module):
    """Two convolutions with calls of functions between them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))))


class Opaque(nn.Module):
    """A forward that no trace can follow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x)) if x.sum() > 0 else x


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.fixture(scope="module")
def ticket():
    model = st.prune(torchvision.models.resnet18(num_classes=10), 0.9)
    return st.swap_activations(st.inject_skips(model, shortcut="projection"), "swish")


def test_the_numbers_are_those_of_sparsity(ticket):
    report, shown = st.sparsity(ticket), summary(ticket)
    counts = shown.facts.part.counts
    assert counts.parameters == report.parameters + report.added_parameters
    assert counts.kept == report.parameters_kept + report.added_kept
    assert (counts.prunable, counts.prunable_kept, counts.added) == (
        report.weights,
        report.kept,
        report.added_parameters,
    )
    for layer in report.layers:
        part = part_at(shown, layer.name.removesuffix(".weight"))
        assert (part.counts.prunable, part.counts.prunable_kept) == (layer.weights, layer.kept)


def test_the_flops_are_those_of_cost():
    inputs = torch.randn(1, 3, 8, 8)
    ticket = st.inject_skips(st.prune(plain(3), 0.5), shortcut="projection")
    cost, shown = st.cost(ticket, inputs), diff(ticket, ticket, inputs=inputs)
    assert total(shown, "FLOPs").after == total(shown, "FLOPs").before == cost.flops
    assert total(shown, "FLOPs on").after == cost.effective_flops
    assert part_at(shown, "0").counts.flops == 2 * 64 * 4 * 3 * (9 + 1)


def test_other_forms_of_masks_are_counted():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    torch_prune.random_unstructured(model[0], "weight", amount=9)

    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.arange(144).view(4, 4, 3, 3) >= 100)

        def forward(self, weight):
            return weight * self.mask

    parametrize.register_parametrization(model[1], "weight", Mask())
    shown = summary(model)
    assert [part_at(shown, path).counts.prunable_kept for path in "01"] == [27, 44]
    assert [child.name for child in part_at(shown, "1").children] == []


def test_a_tied_module_and_a_tied_weight_count_once():
    layer = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[3].weight = layer.weight
    shown = summary(model)
    assert shown.facts.part.counts.parameters == 16 + 10
    assert marks_at(shown, "2") == ["same as 0"]


def test_zeros_without_a_mask_are_told():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1))
    with torch.no_grad():
        model[0].weight[0] = 0
    told = " ".join(str(summary(model)).split())
    assert "1 of the 2 prunable weights are exactly zero without a mask" in told
    assert "sparsity of the 2 prunable weights 50.00 %" in told


def test_a_zero_that_came_by_chance_is_no_hint_of_a_pruner():
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 2))
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    assert "no masks: nothing is pruned" in str(summary(model))
    assert "no masks" in str(summary(nn.Conv2d(1, 2, 1)))


# ------------------------------------------------------------------------------------------------------ marks and arcs


def test_arcs_span_the_units(ticket):
    shown = summary(ticket)
    identity, projection = "identity, learned", "projection, learned"
    assert part_at(shown, "").arcs == (Arc(0, 1, projection),)
    assert part_at(shown, "layer1.0").arcs == (Arc(0, 1, identity), Arc(3, 4, identity))
    assert part_at(shown, "layer2.0").arcs == (Arc(0, 1, projection), Arc(3, 4, identity))
    assert part_at(shown, "layer2.0.downsample").arcs == (Arc(0, 1, projection),)


def test_an_arc_of_a_unit_without_normalisation_spans_its_layer():
    assert summary(st.inject_skips(Functional())).facts.part.arcs == (
        Arc(0, 0, "pad, learned"),
        Arc(1, 1, "identity, learned"),
    )


def test_what_a_skip_adds_and_where_its_strength_stands():
    tweaked = st.inject_skips(plain(2), shortcut="projection")
    with torch.no_grad():
        tweaked[3].skip.strength.fill_(0.25)
    shown = diff(plain(2), tweaked)
    assert marks_at(shown, "3") == ["skip: identity, learned, now 0.25"]
    assert marks_at(shown, "0") == [f"skip: projection, learned, now 0, {3 * 4 + 2 * 4 + 1} parameters"]
    assert total(shown, "of these from tweaks").after == 21 + 1


def test_swaps_are_marked_as_modules_and_as_calls():
    swapped = st.swap_activations(Functional(), "mish")
    assert marks_at(diff(Functional(), swapped), "") == ["relu → mish in 2 calls", "forward rewritten"]
    assert marks_at(diff(plain(2), st.swap_activations(plain(2), "silu")), "2") == ["ReLU → SiLU"]
    again = st.inject_skips(swapped)
    assert "relu → mish in 2 calls" not in marks_at(diff(swapped, again), "")  # both have it
    assert [change.tweak for change in diff(swapped, again).facts.done] == [st.changes(again)[-1].tweak]


def test_a_ghost_is_shown():
    ghost = st.swap_activations(st.inject_skips(plain(2), ghost=True), "swish", ghost=True)
    assert marks_at(summary(ghost), "3")[0].startswith("skip: identity, strength 1 of 1")
    assert "Ghost" in marks_at(diff(plain(2), ghost), "2")[0]


def test_additions_and_removals_stand_where_they_belong():
    before = nn.ModuleDict({"a": nn.Linear(2, 2), "gone": nn.Linear(2, 3), "b": nn.Linear(2, 2)})
    after = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "new": nn.Linear(2, 5)})
    shown = diff(before, after)
    assert [child.name for child in shown.facts.part.children] == ["a", "gone", "b", "new"]
    assert [marks_at(shown, path) for path in ("a", "gone", "new")] == [[], ["removed"], ["added"]]
    assert part_at(shown, "gone").after is None and part_at(shown, "new").before is None
    assert (total(shown, "parameters").before, total(shown, "parameters").after) == (21, 27)


def test_scaled_weights_are_told_from_trained_ones():
    model = st.prune(plain(3), 0.5)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.mul_(0.5)
        changed[3].weight[changed[3].weight_mask] += torch.arange(int(changed[3].weight_mask.sum()))
    shown = diff(model, changed)
    assert marks_at(shown, "0") == ["weight scaled ×0.5"]
    assert marks_at(shown, "3") == [] == marks_at(shown, "6")
    assert f"the kept values of 1 of {len(list(model.parameters()))} parameter tensors differ" in str(shown)


def test_pruning_alone_changes_no_kept_value():
    model = plain(3)
    shown = diff(model, st.prune(model, 0.5))
    assert "differ" not in str(shown)
    assert total(shown, "sparsity").after == pytest.approx(0.5, abs=0.01)
    assert total(shown, "sparsity").before == 0


def test_two_that_are_alike():
    model = plain(2)
    assert "no module, mask, parameter or buffer differs" in str(diff(model, copy.deepcopy(model)))


def test_what_was_left_is_said_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), Opaque())
    tweaked = st.swap_activations(model, "swish")
    reason = st.changes(tweaked)[0].left[0].left
    for text in (str(diff(model, tweaked)), diff(model, tweaked)._repr_html_()):
        assert reason.split(":")[0] in " ".join(re.sub("<.*?>", "", text).split())
        assert "2.relu" in text


# ------------------------------------------------------------------------------------------------------------- folding


def test_runs_are_folded_and_lose_nothing():
    model = st.prune(st.inject_skips(plain()), 0.5)
    part = summary(model).facts.part
    rows = fold(part, {})
    assert [(row.start, row.stop) for row in rows] == [*((i, i + 1) for i in range(6)), (6, 1500)]
    assert rows[-1].part.times == 498
    assert sum(row.part.counts.kept for row in rows) == part.counts.kept


def test_a_block_that_differs_is_not_folded_away():
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(9)]
    blocks[5][1] = nn.GELU()
    rows = fold(summary(nn.Sequential(*blocks)).facts.part, {})
    assert [(row.start, row.stop) for row in rows] == [(0, 1), (1, 5), (5, 6), (6, 9)]
    assert rows[2].open


MODELS = {
    "resnet18": torchvision.models.resnet18,
    "squeezenet": torchvision.models.squeezenet1_1,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "plain500": plain,
}


@pytest.mark.parametrize("name", MODELS)
def test_text_fits_a_terminal(name):
    model = MODELS[name]()
    tweaked = st.swap_activations(st.inject_skips(st.prune(model, 0.9)), "mish", kinds=("relu", "hardswish"))
    for shown in (summary(tweaked), diff(model, tweaked)):
        lines = str(shown).splitlines()
        assert max(map(len, lines)) <= 100
        assert len(lines) < 130
        assert repr(shown) == str(shown)


# ---------------------------------------------------------------------------------------------------------------- HTML


class Balanced(HTMLParser):
    """Every element closed where it should be."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def pages(ticket):
    return [
        summary(ticket)._repr_html_(),
        diff(torchvision.models.resnet18(num_classes=10), ticket)._repr_html_(),
    ]


def test_html_is_whole_and_calls_nobody(pages):
    for page in pages:
        tags = parsed(page).tags
        assert {tag for tag, _ in tags} <= {
            "div", "span", "style", "details", "summary", "b", "i", "s", "em", "small", "svg", "path", "title",
        }  # fmt: skip
        assert not [
            name for _, attributes in tags for name in attributes if name.startswith("on") or name == "src"
        ]
        assert "http" not in page and "url(" not in page and "@import" not in page


def test_every_skip_that_can_be_seen_is_an_arc(pages, ticket):
    skips = sum("skip" in name.rpartition(".")[2] for name, _ in ticket.named_modules())
    assert [sum(tag == "svg" for tag, _ in parsed(page).tags) for page in pages] == [skips, skips]


def test_styles_stay_inside():
    rules = re.sub(r"@media[^{]*\{(.*?\})\}", r"\1", sheet(), flags=re.DOTALL)
    selectors = [
        each for rule in re.findall(r"([^{}]+)\{", rules) for each in rule.split(",") if each.strip()
    ]
    assert len(selectors) > 40
    for selector in selectors:
        assert f".{ROOT}" in selector, selector
        page = selector.partition(f".{ROOT}")[0].strip()
        assert page == "" or page.startswith(("[data-", ".vscode-", "html[")), selector
    assert "prefers-color-scheme:dark" in sheet() and 'data-jp-theme-light="false"' in sheet()


def test_the_gutter_of_a_part_is_its_own():
    """Variables are inherited: without a value of their own, the children of a part without arcs had no gutter."""
    assert f".{ROOT} .k{{--gutter:18px" in sheet().replace(" {", "{")
    page = summary(nn.Sequential(st.inject_skips(plain(1))))._repr_html_()
    assert page.count('style="--gutter:0px"') == 1  # at the root only, where there is no arc


def test_names_are_escaped():
    class Odd(nn.Linear):
        def extra_repr(self):
            return "<script>alert('&')</script>"

    Odd.__name__ = "Odd<T>"
    model = nn.Module()
    model.add_module("<b onclick='x'>&amp;", Odd(2, 2))
    page = parsed(summary(model)._repr_html_())
    assert not [tag for tag, attributes in page.tags if tag == "script" or "onclick" in attributes]
    assert "<b onclick='x'>&amp;" in page.text and "Odd<T>" in page.text


def test_500_layers_are_small_and_quick():
    model = plain()
    tweaked = st.swap_activations(st.inject_skips(st.prune(model, 0.9)), "mish")
    start = time.perf_counter()
    page = diff(model, tweaked)._repr_html_()
    assert time.perf_counter() - start < SECONDS
    assert len(page.encode()) < BYTES
    assert sum(tag == "svg" for tag, _ in parsed(page).tags) == 500


# ------------------------------------------------------------------------------------------------------------- manners


def test_models_are_only_read():
    model = st.inject_skips(st.prune(plain(3), 0.5)).train()
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    str(diff(model, model, inputs=torch.ones(1, 3, 8, 8)))
    assert torch.equal(torch.get_rng_state(), rng)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))


def test_it_is_no_part_of_the_model():
    shown = summary(plain(1))
    assert not [value for value in vars(shown.facts).values() if isinstance(value, (nn.Module, torch.Tensor))]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="run one batch through the lazy model"):
        summary(nn.Sequential(nn.LazyLinear(2)))
    sparse = nn.Sequential(nn.Linear(2, 2))
    sparse[0].weight = nn.Parameter(sparse[0].weight.detach().to_sparse())
    with pytest.raises(ValueError, match=r"'0.weight' is stored as torch.sparse_coo.*to_dense"):
        summary(sparse)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
        diff(plain(1), {})
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str"):
        summary("model")


def test_a_model_without_values_shows_its_sizes():
    with torch.device("meta"):
        model = plain(2)
    assert total(summary(model), "parameters").after == sum(p.numel() for p in model.parameters())
