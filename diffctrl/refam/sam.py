"""Masks by SAM, SAM 2 or SAM 2 video of transformers, for users who have the weights. One positive point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffctrl.refam.config import SamChoice
from diffctrl.refam.locate import enlarged

_PICTURE = {"sam": ("SamModel", "SamProcessor"), "sam2": ("Sam2Model", "Sam2Processor")}
_VIDEO = {"sam2_video": ("Sam2VideoModel", "Sam2VideoProcessor")}
_KINDS = _PICTURE | _VIDEO


class Segmenter:
    """A segmentation model by its folder or hub name; safetensors only.

    Weights of the kind "sam2_video" also segment single pictures, as SAM 2.

    Raises:
        ValueError: there are no such weights, or they are of another kind.
    """

    def __init__(self, name: str, *, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> None:
        import transformers

        self.name, self.device = name, torch.device(device)
        self.kind = self._kind(name)
        local = Path(name).expanduser().is_dir()
        self._dtype = dtype
        self._models: dict[str, tuple[Any, Any]] = {}
        self._library, self._local = transformers, local

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
        if kind not in _KINDS:
            raise ValueError(f"sam={name!r} is a {kind!r} model; accepted: {', '.join(_KINDS)}")
        return str(kind)

    def _load(self, kind: str) -> tuple[Any, Any]:
        if kind not in self._models:
            model_name, processor_name = _KINDS[kind]
            try:
                model = getattr(self._library, model_name).from_pretrained(
                    self.name, use_safetensors=True, local_files_only=self._local
                )
                processor = getattr(self._library, processor_name).from_pretrained(
                    self.name, local_files_only=self._local
                )
            except (OSError, ValueError, ImportError) as error:
                first = str(error).strip().splitlines()[0]
                raise ValueError(f"sam={self.name!r} cannot be loaded: {first}") from None
            self._models[kind] = model.to(self.device, self._dtype).eval(), processor
        return self._models[kind]

    def mask(self, image: Any, point: tuple[float, float], heat: Tensor, choice: SamChoice) -> Tensor:
        """(H, W) bool of one picture.

        Args:
            image: PIL image.
            point: (x, y) in pixels.
            heat: (h, w), to choose among the masks.
            choice: see `RefAMConfig`.
        """
        model, processor = self._load("sam" if self.kind == "sam" else "sam2")
        # SAM nests points as (images, points), SAM 2 as (images, objects, points).
        points: Any = [[list(point)]] if self.kind == "sam" else [[[list(point)]]]
        arguments: dict[str, Any] = {"input_points": points}
        if self.kind != "sam":
            arguments["input_labels"] = [[[1]]]
        inputs = processor(images=image, return_tensors="pt", **arguments)
        inputs = inputs.to(self.device)
        with torch.no_grad():
            output = model(**inputs, multimask_output=True)
        sizes = [inputs["original_sizes"]]
        if self.kind == "sam":
            sizes.append(inputs["reshaped_input_sizes"])
        masks = processor.post_process_masks(output.pred_masks.float().cpu(), *[s.cpu() for s in sizes])[0]
        scores = output.iou_scores.float().flatten().cpu()
        return chosen_mask(masks.reshape(-1, *masks.shape[-2:]).bool(), scores, heat, choice)

    def track(self, frames: list[Any], point: tuple[float, float], frame: int) -> Tensor:
        """(F, H, W) bool: the object at a point of one frame, followed to both ends of the video.

        Raises:
            ValueError: the weights are of SAM for pictures.
        """
        if self.kind != "sam2_video":
            raise ValueError(
                f"sam={self.name!r} is a {self.kind!r} model, which follows nothing through a video; "
                "give SAM 2 video weights (model_type sam2_video)"
            )
        model, processor = self._load("sam2_video")
        session = processor.init_video_session(video=frames, inference_device=self.device, dtype=self._dtype)
        processor.add_inputs_to_inference_session(
            inference_session=session,
            frame_idx=frame,
            obj_ids=1,
            input_points=[[[list(point)]]],
            input_labels=[[[1]]],
        )
        width, height = frames[0].size
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            model(inference_session=session, frame_idx=frame)
            for backwards in (False, True):
                for output in model.propagate_in_video_iterator(
                    session, start_frame_idx=frame, reverse=backwards
                ):
                    masks = processor.post_process_masks(
                        [output.pred_masks], original_sizes=[[height, width]], binarize=True
                    )[0]
                    found[output.frame_idx] = masks.reshape(-1, height, width)[0].bool().cpu()
        nothing = torch.zeros(height, width, dtype=torch.bool)
        return torch.stack([found.get(index, nothing) for index in range(len(frames))])


def chosen_mask(masks: Tensor, scores: Tensor, heat: Tensor, choice: SamChoice) -> Tensor:
    """One of SAM's masks.

    "score" is SAM's own choice. With one point it often takes a part of the object; "heat" takes the best
    score among the masks that are warmer inside than the picture on average, and the best score where none is.

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
