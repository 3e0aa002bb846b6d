"""placeholder"""
from typing import Any
def dense_kernel(net: Any, x: Any, x2: Any, memory: int) -> Any:
    return None
