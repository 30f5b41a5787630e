"""Random small networks that contain what breaks model surgery, for property tests with hypothesis.

People write forwards that a tracer freezes, reorders or drops: in-place operations seen through another
name, `F.dropout(x, training=self.training)`, a branch on `torch.is_grad_enabled()`, a counter, a custom
gradient, one module under two names. Each such hazard is one small block class here. A `Spec` (plain data,
which hypothesis can shrink and print) names the blocks of one network, `build` makes it, `observe` records
all it does, and `snapshot` all it is::

    @given(spec=specs())
    def test_a_rewrite_changes_nothing_at_its_neutral_setting(spec):
        batch = example_batch(spec)
        before = observe(build(spec), batch, training=True)
        after = observe(my_rewrite(build(spec)), batch, training=True)
        assert differences(before, after) == []

The same spec always builds the same network, so two calls give two twins that share nothing. No function here
reads or moves a global random state. Needs hypothesis: `pip install sparsetweaks[testing]`.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "sparsetweaks.testing needs hypothesis; install it with: pip install 'sparsetweaks[testing]'"
    ) from error

from sparsetweaks.testing.activations import ACTIVATIONS
from sparsetweaks.testing.blocks import BLOCKS
from sparsetweaks.testing.hazards import HAZARDS, hazards, picklable
from sparsetweaks.testing.layers import LAYERS, RESHAPING
from sparsetweaks.testing.masking import FORMS, Masked, mask_model, maskable_weights
from sparsetweaks.testing.networks import Batch, build, example_batch, isolated_rng
from sparsetweaks.testing.observing import Observation, differences, observe, snapshot
from sparsetweaks.testing.specs import BlockSpec, Spec
from sparsetweaks.testing.strategies import batches, draw_spec, masked_models, masks, models, specs

__all__ = [
    "ACTIVATIONS",
    "BLOCKS",
    "FORMS",
    "HAZARDS",
    "LAYERS",
    "RESHAPING",
    "Batch",
    "BlockSpec",
    "Masked",
    "Observation",
    "Spec",
    "batches",
    "build",
    "differences",
    "draw_spec",
    "example_batch",
    "hazards",
    "isolated_rng",
    "mask_model",
    "maskable_weights",
    "masked_models",
    "masks",
    "models",
    "observe",
    "picklable",
    "snapshot",
    "specs",
]
