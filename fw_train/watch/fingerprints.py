"""Weights that must not differ: frozen ones over time, replicated ones among the ranks."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fw_train.dist import gather_texts
from fw_train.watch.guards import weights_fingerprint


def frozen_fingerprint(module: nn.Module) -> str:
    """Of what this rank holds of the weights that do not train: it never changes during a run."""
    return weights_fingerprint({name: _local(p) for name, p in module.named_parameters() if not p.requires_grad})


class Replicas:
    """The trainable weights that every rank holds whole: they must be equal to the last bit."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = {
            name: p.detach() for name, p in module.named_parameters() if p.requires_grad and not _is_sharded(p)
        }

    def check(self) -> None:
        """Names the ranks whose weights differ from those of most; all ranks together."""
        if not self._tensors:
            return
        found = gather_texts(weights_fingerprint(self._tensors))
        usual = max(sorted(set(found)), key=found.count)
        if found.count(usual) == len(found):
            return
        majority = 2 * found.count(usual) > len(found)
        strays = [rank for rank, text in enumerate(found) if text != usual or not majority]
        who = f"of {'rank' if len(strays) == 1 else 'ranks'} {', '.join(map(str, strays))}"
        raise RuntimeError(
            f"the weights {who} {'differ from the others' if majority else 'differ from each other'} (of {len(found)} ranks): a "
            f"GPU or its memory is at fault, or the program; resume from the last checkpoint, without that machine"
        )


def _local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)  # ZeRO stage 3 keeps its part beside an emptied parameter


def _is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")
