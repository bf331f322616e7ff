"""What a copy of a pruned model gets for itself, and pickle refuses: a file of it could not be loaded alone."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NoReturn

from ...registry import ModelError


def refuse_pickle() -> NoReturn:
    """Raise the :class:`ModelError` of ``pickle`` and ``torch.save``."""
    raise ModelError(
        "a pruned model cannot be pickled (torch.save, pickle, multiprocessing). Write the smaller model with "
        "pruned.save(DIR) or prunekit export; for the dense weights save model.state_dict(), or call pruned.remove() "
        "first"
    )


class Unpickled:
    """An object that ``copy.deepcopy`` copies and ``pickle`` refuses."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle()


class Hook(partial):
    """A function with its first arguments, which is put on a module; a copied module's has copies of the arguments."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(self.func, *copy.deepcopy(self.args, memo))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle()
