"""What users write, checked by mypy (`make types`): nothing here may need a cast or an ignore."""

from prunekit.registry import HistoryStorage
from prunekit.strategies.allocation import Uniform
from prunekit.strategies.pp import PP

uniform = Uniform()
storage = HistoryStorage(dtype="float16")
strategy = PP(ratio=0.4, allocator=uniform, history=storage)

# The control: mypy reports an ignore that nothing needs, so this line fails where types are not checked at all.
PP(ratio="a lot")  # type: ignore[arg-type]
