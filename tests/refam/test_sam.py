"""SAM, SAM 2 and SAM 2 video: real tiny models with random weights, from disk."""

import pytest
import torch
from PIL import Image
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VideoConfig,
    Sam2VideoMaskDecoderConfig,
    Sam2VideoModel,
    Sam2VideoPromptEncoderConfig,
    Sam2VisionConfig,
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from diffctrl.refam import sam
from diffctrl.refam.sam import Segmenter, chosen_mask
from tests.refam.models import SIZES, picture, sd3, wan

_WIDTH = 128


def _sam(folder):
    vision = SamVisionConfig(
        hidden_size=16, output_channels=8, num_hidden_layers=1, num_attention_heads=2, image_size=64,
        patch_size=8, window_size=2, global_attn_indexes=[0], num_pos_feats=4, mlp_dim=16,
    )  # fmt: skip
    prompt = SamPromptEncoderConfig(hidden_size=8, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=8, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=8
    )
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(folder)
    sizes = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    masks = {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    SamProcessor(SamImageProcessor(**sizes, **masks)).save_pretrained(folder)


def _vision2():
    backbone = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 32,
        64], num_attention_heads_per_stage=[1, 1, 1, 1], window_size_per_stage=[4, 2, 4, 2],
        global_attention_blocks=[3], image_size=[64, 64], window_positional_embedding_background_size=[4, 4],
    )  # fmt: skip
    return Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=_WIDTH,
    )


_PROMPT = {"hidden_size": _WIDTH, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
_DECODER = {
    "hidden_size": _WIDTH, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "iou_head_hidden_dim": 16
}  # fmt: skip


def _sam2(folder):
    config = Sam2Config(
        vision_config=_vision2(),
        prompt_encoder_config=Sam2PromptEncoderConfig(**_PROMPT),
        mask_decoder_config=Sam2MaskDecoderConfig(**_DECODER),
    )
    Sam2Model(config).save_pretrained(folder)


def _sam2_video(folder):
    config = Sam2VideoConfig(
        vision_config=_vision2(),
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(**_PROMPT),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(**_DECODER),
        image_size=64, num_maskmem=3, memory_attention_hidden_size=_WIDTH, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=16, memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=_WIDTH, memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=_WIDTH, memory_fuser_num_layers=1, memory_fuser_embed_dim=_WIDTH,
        memory_fuser_intermediate_dim=16,
    )  # fmt: skip
    Sam2VideoModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, make in (("sam", _sam), ("sam2", _sam2), ("sam2_video", _sam2_video)):
        made[name] = tmp_path_factory.mktemp("weights") / name
        torch.manual_seed(0)
        make(made[name])
    return made


@pytest.mark.parametrize("kind", ["sam", "sam2", "sam2_video"])
def test_masks_of_pictures(folders, kind):
    found = sd3()(picture(), "the red star", mask="sam", sam=str(folders[kind]))
    assert found.mask.shape == (30, 50)
    assert found.mask.dtype == torch.bool
    again = Segmenter(str(folders[kind])).mask(
        _image(picture()), found.point, found.heat, found.config.sam_choice
    )
    assert torch.equal(again, found.mask)


def _image(pixels):
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def test_tracks_of_videos(folders):
    video = torch.stack([picture(seed) for seed in range(5)])
    found = wan()(video, "the red star", size=SIZES["wan"], mask="sam", sam=str(folders["sam2_video"]))
    assert found.track.shape == (5, 30, 50)
    assert torch.equal(found.track[found.frame], found.mask)
    with pytest.raises(ValueError, match="follows nothing"):
        wan()(video, "the red star", size=SIZES["wan"], mask="sam", sam=str(folders["sam2"]))


def test_points_and_pictures_are_squeezed_alike():
    assert sam._scaled((25.0, 15.0), (50, 30), 64).flatten().tolist() == [32.0, 32.0]
    square = sam._prepared([Image.new("RGB", (50, 30), (255, 255, 255))], 64)
    assert square.shape == (1, 3, 64, 64)
    assert float(square[0, 0, 0, 0]) == pytest.approx((1 - 0.485) / 0.229)


def test_the_choice_among_masks():
    heat = torch.zeros(4, 4)
    heat[:2] = 1
    part, whole, elsewhere = torch.zeros(3, 8, 8, dtype=torch.bool)
    part[0, 0] = whole[:4] = elsewhere[4:] = True
    masks, scores = torch.stack([part, whole, elsewhere]), torch.tensor([0.5, 0.7, 0.9])
    assert torch.equal(chosen_mask(masks, scores, heat, "score"), elsewhere)
    assert torch.equal(chosen_mask(masks, scores, heat, "heat"), whole)
    assert torch.equal(chosen_mask(masks[2:], scores[2:], heat, "heat"), elsewhere)  # better than none


def test_weights_that_are_not_there_or_of_another_kind(tmp_path, folders):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert' model; accepted: sam, sam2, sam2_video"):
        Segmenter(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        Segmenter(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no folder"):
        Segmenter("no/such-weights")
