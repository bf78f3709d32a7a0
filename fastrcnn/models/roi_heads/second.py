"""What the mask and the keypoint head have in common: they look again at regions that the box head has found."""

from typing import Any

from torch import Tensor, nn

from fastrcnn.config import ConfigError, conventions_of
from fastrcnn.models.layers import of_rows
from fastrcnn.models.registry import Registry
from fastrcnn.models.roi_heads.box import BoxHead, CascadeBoxHead
from fastrcnn.models.roi_heads.sampling import Pooler
from fastrcnn.structures import SampleBatch


class SecondHead(nn.Module):
    """feature_extractor and predictor that the keys of a section of the config name; ConfigError for what they cannot
    be.

    With SHARE_BOX_FEATURE_EXTRACTOR it reads what the box head extracts; the parameters belong to that one alone.
    """

    def __init__(
        self, cfg: Any, section: str, extractors: Registry, predictors: Registry, in_channels: int, box: BoxHead
    ):
        super().__init__()
        self.section = section
        self.spec = spec = getattr(cfg.MODEL, section)
        self.conventions = conventions_of(cfg)
        self.shared = None
        if spec.SHARE_BOX_FEATURE_EXTRACTOR:
            _check_sharing(cfg, section, box)
            self.shared = box.extract  # not the module, whose parameters would be listed twice
            channels = box.feature_extractor.out_channels
        else:
            self.pooler = Pooler(cfg, spec)
            extractor = extractors.find(spec.FEATURE_EXTRACTOR, f"MODEL.{section}.FEATURE_EXTRACTOR")
            self.feature_extractor = extractor(cfg, in_channels)
            channels = self.feature_extractor.out_channels
        self.predictor = predictors.find(spec.PREDICTOR, f"MODEL.{section}.PREDICTOR")(cfg, channels)

    def extract(self, features: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        """boxes [B, R, 4], valid bool [B, R] -> [B·R, C, s, s]."""
        if self.shared is not None:
            return self.shared(features, boxes, valid)
        return of_rows(self.feature_extractor, self.pooler(features, boxes, valid), valid)

    def of_positives(self, features: list[Tensor], samples: SampleBatch, extracted: Tensor, valid: Tensor) -> Tensor:
        """-> [B·P, C, s, s] of the P slots of positives, which come first in the samples; valid bool [B, P].

        extracted [B·R, ...]: what the box head extracted from all samples, used where the two heads share it.
        """
        chosen = slice(samples.num_positive)
        if self.shared is None:
            return self.extract(features, samples.boxes[:, chosen], valid)
        return extracted.unflatten(0, samples.labels.shape)[:, chosen].flatten(0, 1)

    def checked(self, logits: Tensor) -> Tensor:
        """The logits [..., S, S]; ConfigError unless S is RESOLUTION."""
        if logits.shape[-1] != self.spec.RESOLUTION:
            raise ConfigError(
                f"MODEL.{self.section}.RESOLUTION is {self.spec.RESOLUTION}; {self.spec.PREDICTOR} gives "
                f"{logits.shape[-1]}"
            )
        return logits


def _check_sharing(cfg: Any, head: str, box: BoxHead) -> None:
    """What a section cannot have of its own while it shares the box head's; ConfigError names the key."""
    if isinstance(box, CascadeBoxHead):
        raise ConfigError(
            "MODEL.CASCADE_ON is True and has several feature extractors; it needs "
            f"MODEL.{head}.SHARE_BOX_FEATURE_EXTRACTOR False"
        )
    for key in ("FEATURE_EXTRACTOR", "POOLER_RESOLUTION", "POOLER_SAMPLING_RATIO", "POOLER_SCALES"):
        ours, theirs = getattr(getattr(cfg.MODEL, head), key), getattr(cfg.MODEL.ROI_BOX_HEAD, key)
        if ours != theirs:
            raise ConfigError(
                f"MODEL.{head}.SHARE_BOX_FEATURE_EXTRACTOR is True, but MODEL.{head}.{key} is {ours!r} and "
                f"MODEL.ROI_BOX_HEAD.{key} {theirs!r}: make them equal, or do not share"
            )
