"""Masks by SAM, SAM 2 or SAM 2 video of transformers, for users who have the weights. One positive point.

SAM 2's processors of transformers need torchvision; what they do to a picture and a point is a few lines,
which are here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffctrl.refam.config import SamChoice
from diffctrl.refam.locate import enlarged

_MODELS = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2VideoModel"}
# Of ImageNet, which SAM 2 was trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segmenter:
    """A segmentation model by its folder or hub name; safetensors only.

    Weights of the kind "sam2_video" also segment single pictures, as SAM 2.

    Raises:
        ValueError: there are no such weights, or they are of another kind.
    """

    def __init__(self, name: str, *, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.name, self.device, self._dtype = name, torch.device(device), dtype
        self.kind = self._kind(name)
        self._models: dict[str, Any] = {}

    @staticmethod
    def _kind(name: str) -> str:
        folder = Path(name).expanduser()
        if folder.is_dir():
            config = folder / "config.json"
            if not config.is_file():
                raise ValueError(f"the folder {name} has no config.json: it holds no SAM weights")
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        else:
            from transformers import AutoConfig

            try:
                kind = AutoConfig.from_pretrained(name).model_type
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"sam={name!r} is no folder and cannot be had from the hub ({first})"
                ) from None
        if kind not in _MODELS:
            raise ValueError(f"sam={name!r} is a {kind!r} model; accepted: {', '.join(_MODELS)}")
        return str(kind)

    def _load(self, kind: str) -> Any:
        if kind not in self._models:
            import transformers

            try:
                model = getattr(transformers, _MODELS[kind]).from_pretrained(
                    self.name, use_safetensors=True, local_files_only=Path(self.name).expanduser().is_dir()
                )
            except (OSError, ValueError, ImportError) as error:
                first = str(error).strip().splitlines()[0]
                raise ValueError(f"sam={self.name!r} cannot be loaded: {first}") from None
            self._models[kind] = model.to(self.device, self._dtype).eval()
        return self._models[kind]

    def mask(self, image: Any, point: tuple[float, float], heat: Tensor, choice: SamChoice) -> Tensor:
        """(H, W) bool of one picture.

        Args:
            image: PIL image.
            point: (x, y) in pixels.
            heat: (h, w), to choose among the masks.
            choice: see `RefAMConfig`.
        """
        masks, scores = self._sam(image, point) if self.kind == "sam" else self._sam2(image, point)
        return chosen_mask(masks, scores, heat, choice)

    def _sam(self, image: Any, point: tuple[float, float]) -> tuple[Tensor, Tensor]:
        from transformers import SamProcessor

        model = self._load("sam")
        processor: Any = SamProcessor.from_pretrained(self.name)
        inputs = processor(images=image, input_points=[[list(point)]], return_tensors="pt").to(self.device)
        sizes = [inputs.pop("original_sizes").cpu(), inputs.pop("reshaped_input_sizes").cpu()]
        with torch.no_grad():
            output = model(**inputs, multimask_output=True)
        masks = processor.post_process_masks(output.pred_masks.float().cpu(), *sizes)[0]
        return masks.reshape(-1, *masks.shape[-2:]).bool(), output.iou_scores.float().flatten().cpu()

    def _sam2(self, image: Any, point: tuple[float, float]) -> tuple[Tensor, Tensor]:
        model = self._load("sam2")
        side = _side(model)
        with torch.no_grad():
            output = model(
                pixel_values=_prepared([image], side).to(self.device, self._dtype),
                input_points=_scaled(point, image.size, side).to(self.device, self._dtype),
                input_labels=torch.ones(1, 1, 1, dtype=torch.int32, device=self.device),
                multimask_output=True,
            )
        masks = _large(output.pred_masks[0, 0], image.size)
        return masks, output.iou_scores.float().flatten().cpu()

    def track(self, frames: list[Any], point: tuple[float, float], frame: int) -> Tensor:
        """(F, H, W) bool: the object at a point of one frame, followed to both ends of the video.

        Raises:
            ValueError: the weights are of a model for single pictures.
        """
        if self.kind != "sam2_video":
            raise ValueError(
                f"sam={self.name!r} is a {self.kind!r} model, which follows nothing through a video; "
                "give SAM 2 video weights (model_type sam2_video)"
            )
        from transformers import Sam2VideoInferenceSession

        model = self._load("sam2_video")
        side, size = _side(model), frames[0].size
        session = Sam2VideoInferenceSession(
            video=_prepared(frames, side),
            video_height=size[1],
            video_width=size[0],
            inference_device=self.device,
            inference_state_device=self.device,
            video_storage_device="cpu",
            dtype=self._dtype,
        )
        thing = session.obj_id_to_idx(1)
        points = {"point_coords": _scaled(point, size, side), "point_labels": torch.ones(1, 1, 1).int()}
        session.add_point_inputs(thing, frame, points)
        session.obj_with_new_inputs = [1]
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            model(inference_session=session, frame_idx=frame)
            for backwards in (False, True):
                for output in model.propagate_in_video_iterator(
                    session, start_frame_idx=frame, reverse=backwards
                ):
                    found[output.frame_idx] = _large(output.pred_masks[0], size)[0]
        nothing = torch.zeros(size[1], size[0], dtype=torch.bool)
        return torch.stack([found.get(index, nothing) for index in range(len(frames))])


def _side(model: Any) -> int:
    side = model.config.prompt_encoder_config.image_size
    return int(side if isinstance(side, int) else side[0])


def _prepared(frames: list[Any], side: int) -> Tensor:
    """(F, 3, side, side) float32: squeezed to a square and normalised."""
    pixels = torch.stack([torch.from_numpy(np.array(frame.convert("RGB"))) for frame in frames])
    pixels = F.interpolate(
        pixels.movedim(-1, 1).float() / 255, size=(side, side), mode="bilinear", antialias=True
    )
    return (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


def _scaled(point: tuple[float, float], size: tuple[int, int], side: int) -> Tensor:
    """(1, 1, 1, 2): picture, object, point, (x, y), in the square's pixels; `size` is (width, height)."""
    x, y = point[0] * side / size[0], point[1] * side / size[1]
    return torch.tensor([x, y]).view(1, 1, 1, 2)


def _large(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, H, W) bool of low-resolution logits (K, h, w)."""
    return enlarged(logits.float().cpu(), (size[1], size[0])) > 0


def chosen_mask(masks: Tensor, scores: Tensor, heat: Tensor, choice: SamChoice) -> Tensor:
    """One of SAM's masks.

    "score" is SAM's own choice. With one point it often takes a part of the object; "heat" takes the best
    score among the masks that are warmer inside than the picture on average, and the best score where none
    is.

    Args:
        masks: (K, H, W) bool. scores: (K,). heat: (h, w).
    """
    allowed = torch.ones(len(masks), dtype=torch.bool)
    if choice == "heat":
        large = enlarged(heat.float(), (masks.shape[-2], masks.shape[-1]))
        warm = torch.stack([large[mask].mean() if bool(mask.any()) else large.min() for mask in masks])
        allowed = warm > large.mean()
        if not bool(allowed.any()):
            allowed[:] = True
    return masks[int(torch.where(allowed, scores, -torch.inf).argmax())]
