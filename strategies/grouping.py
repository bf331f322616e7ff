"""Which rows of a batch share a decision. Letters: B rows, U units."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import Grouping, OneForAll, hookimpl


class ByRow(Grouping):
    """Every row chooses its own units: they do not depend on the other rows of the batch."""

    name: Literal["row"] = "row"

    def most(self, rows: int) -> int:
        return rows

    def groups(self, scores: Tensor) -> Tensor:
        return torch.arange(len(scores))


class ByLikeness(Grouping):
    """Rows with like scores share a decision: the cosine of the units' scores, clustered by average linkage."""

    name: Literal["cluster"] = "cluster"
    clusters: int = Field(default=4, ge=1, description="most groups of a batch")

    def most(self, rows: int) -> int:
        return min(self.clusters, rows)

    def groups(self, scores: Tensor) -> Tensor:
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform

        if len(scores) < 2:
            return torch.zeros(len(scores), dtype=torch.int64)
        unit = torch.nn.functional.normalize(scores.double(), dim=1)
        distances = (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0)
        tree = linkage(squareform(distances.numpy(), checks=False), "average")
        return torch.from_numpy(fcluster(tree, self.clusters, "maxclust")).long() - 1


@hookimpl
def groupings() -> list[type[Grouping]]:
    return [OneForAll, ByRow, ByLikeness]
