"""One module, weight or normalisation in several places, or in none."""

from __future__ import annotations

from torch import Tensor, nn

from sparsetweaks.testing.blocks.block import Block
from sparsetweaks.testing.specs import BlockSpec


class Reused(Block):
    """One unit called twice in one forward."""

    adds_input = True

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.act(self.unit(x)))


class TiedWeights(Block):
    """One `Parameter` in two modules."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2, self.conv3 = self.second(), self.second()
        self.conv3.weight = self.conv2.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x) + self.conv3(self.act(self.conv2(x)))


class TiedEmbedding(Block):
    """A linear layer and an embedding that share one weight."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.embedding = nn.Embedding(5, self.width)
        self.scores = nn.Linear(self.width, 5, bias=False)
        self.scores.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.unit(x))
        scores = self.scores(out.flatten(2).mean(2) if self.rank else out)
        words = self.embedding(scores.argmax(1)) + scores.mean()
        return out + words.view(words.size(0), *self.channels_shape[1:])


class TwoNames(Block):
    """One module registered under two names, and both are called."""

    adds_input = True

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.again = self.conv
        self.act_again = self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act_again(self.again(self.act(self.unit(x))))


class SharedNorm(Block):
    """One normalisation after two layers."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.conv2 = self.second()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.act(self.unit(x)))
        return self.act(out if self.norm is None else self.norm(out))


class Unused(Block):
    """Modules that no forward calls."""

    def extend(self, spec: BlockSpec, width: int) -> None:
        self.spare = nn.Sequential(self.second(), nn.ReLU())
