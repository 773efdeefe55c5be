"""The U-Net presets and the class-token encoder: attention of Sec. 3.3, sizes, conditions, gradients."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention
from gaussian_data import noise

from diffusers_cf import ClassTokenEncoder, class_token_encoder, counterfactual_unet
from diffusers_cf.losses import noise_prediction_loss
from diffusers_cf.models import CONDITIONINGS, ConditionalNoisePredictor, predict_noise, unet_config
from diffusers_cf.schedulers import DynamicDDIMScheduler


def moved_off_zero(module):
    """Replace parameters that start at zero by small random values, as if training had moved them."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def written_out_attention(layer, image, tokens):
    """softmax(Q [K_c; K]^T / sqrt(d)) [V_c; V] of Sec. 3.3, projected and added to the image."""
    batch, channels = image.shape[:2]

    def heads(projected):
        return projected.unflatten(2, (layer.heads, channels // layer.heads)).transpose(1, 2)

    x = layer.group_norm(image.flatten(2)).transpose(1, 2)
    query = heads(layer.to_q(x))
    key = torch.cat([heads(layer.add_k_proj(tokens)), heads(layer.to_k(x))], dim=2)
    value = torch.cat([heads(layer.add_v_proj(tokens)), heads(layer.to_v(x))], dim=2)
    logits = query @ key.transpose(2, 3) / math.sqrt(channels // layer.heads)
    weights = logits.exp() / logits.exp().sum(dim=3, keepdim=True)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    return image + layer.to_out[0](mixed).transpose(1, 2).reshape(image.shape)


@torch.no_grad()
def test_every_attention_layer_concatenates_the_tokens_to_keys_and_values():
    torch.manual_seed(0)
    unet, encoder = moved_off_zero(counterfactual_unet("small", image_size=16)), class_token_encoder("small")
    seen = []

    def note(layer, args, kwargs, output):
        seen.append((layer, args[0], kwargs["encoder_hidden_states"], output))

    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.register_forward_hook(note, with_kwargs=True)
    condition = encoder(torch.tensor([0, 1]))
    predict_noise(unet, noise(2, 4, 16, 16), torch.tensor(500), condition)
    # two levels with one layer down and two up, and the middle
    assert len(seen) == len(layers) == 7
    for layer, image, tokens, output in seen:
        assert torch.equal(tokens, condition[0])
        torch.testing.assert_close(output, written_out_attention(layer, image, tokens), atol=2e-5, rtol=1e-5)
        assert (output - image).abs().max() > 1e-2


@torch.no_grad()
def test_adagn_has_the_vector_and_no_tokens():
    unet, encoder = moved_off_zero(counterfactual_unet("small", "adagn", 16)), class_token_encoder("small")
    assert not any("add_k_proj" in name for name, _ in unet.named_parameters())
    assert any(isinstance(module, Attention) for module in unet.modules())
    x, t, (tokens, vector) = noise(1, 4, 16, 16), torch.tensor(500), encoder(torch.tensor([0, 1]))
    base = predict_noise(unet, x, t, (tokens[:1], vector[:1]))
    assert torch.equal(predict_noise(unet, x, t, (tokens[1:], vector[:1])), base)
    assert (predict_noise(unet, x, t, (tokens[:1], vector[1:])) - base).abs().max() > 1e-3


@torch.no_grad()
def test_unconditional_takes_no_condition():
    model = ConditionalNoisePredictor(moved_off_zero(counterfactual_unet("small", "unconditional", 16)))
    x, t = noise(2, 4, 16, 16), torch.tensor([500, 500])
    assert torch.equal(model(x, t, torch.tensor([0, 1])), model(x, t, torch.tensor([2, 2])))
    with pytest.raises(ValueError, match="class_labels"):
        predict_noise(counterfactual_unet("small", "adagn", 16), x, t, None)


def test_number_of_parameters():
    with torch.device("meta"):
        for conditioning in CONDITIONINGS:
            low, high = (27.1, 27.2) if conditioning == "attention" else (20, 27)
            for size, least, most in (("paper", low, high), ("small", 1, 4)):
                networks = counterfactual_unet(size, conditioning), class_token_encoder(size)
                total = sum(parameter.numel() for network in networks for parameter in network.parameters())
                assert least <= total / 1e6 <= most


def test_paper_preset_is_the_authors_network():
    config = unet_config("paper")
    assert config["sample_size"] == 64 and config["in_channels"] == config["out_channels"] == 4
    assert config["block_out_channels"] == (64, 128, 192, 256)
    assert config["layers_per_block"] == 2 and config["dropout"] == 0.1 and config["norm_num_groups"] == 32
    assert config["resnet_time_scale_shift"] == "scale_shift" and config["class_embed_type"] == "identity"
    # attention at 32, 16 and 8 pixels and in the middle
    assert config["down_block_types"] == ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3)
    assert config["up_block_types"] == (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D")
    assert config["mid_block_type"] == "UNetMidBlock2DSimpleCrossAttn"
    with torch.device("meta"):
        unet, encoder = counterfactual_unet("paper"), class_token_encoder("paper")
    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    assert len(layers) == 16 and {layer.to_q.out_features // layer.heads for layer in layers} == {64}
    assert {layer.add_k_proj.in_features for layer in layers} == {256}
    tokens, vector = encoder(torch.zeros(1, dtype=torch.int64, device="meta"))
    assert tokens.shape == (1, 256, 256) and vector.shape == (1, 256)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("image_size, channels, classes", [(8, 1, 2), (24, 3, 4), (40, 4, 3)])
@torch.no_grad()
def test_any_size_channels_and_classes(conditioning, image_size, channels, classes):
    names = [f"class {i}" for i in range(classes)]
    unet = moved_off_zero(counterfactual_unet("small", conditioning, image_size, channels))
    encoder = class_token_encoder("small", names) if conditioning != "unconditional" else None
    model = ConditionalNoisePredictor(unet, encoder)
    x, ids = noise(2, channels, image_size, image_size), torch.tensor([0, classes])
    output = model(x, torch.tensor([0, 999]), ids)
    assert output.shape == x.shape and output.isfinite().all() and output.std() > 0.01


def test_a_new_network_predicts_zero():
    model = ConditionalNoisePredictor(counterfactual_unet("small", image_size=8), class_token_encoder("small"))
    assert not model(noise(1, 4, 8, 8), torch.tensor([500]), torch.tensor([0])).any()
    weights = {name: weight for name, weight in model.unet.named_parameters() if name.endswith(".weight")}
    for name, weight in weights.items():
        begins_at_zero = ".conv2." in name or ".to_out.0." in name or name == "conv_out.weight"
        assert bool(weight.any()) != begins_at_zero, name


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="size is 'big'"):
        counterfactual_unet("big")
    with pytest.raises(ValueError, match="conditioning is 'text'"):
        counterfactual_unet("small", "text")
    for side in (0, -8, 12, 65):
        with pytest.raises(ValueError, match=f"image_size is {side}"):
            counterfactual_unet("small", "attention", side)


@pytest.mark.parametrize("size, conditioning", [("small", "attention"), ("small", "adagn"), ("paper", "attention")])
def test_gradient_reaches_every_parameter(size, conditioning):
    torch.manual_seed(0)
    unet, encoder = counterfactual_unet(size, conditioning, 8), class_token_encoder(size)
    if conditioning == "adagn":
        encoder.tokens.requires_grad_(False)
    model = ConditionalNoisePredictor(unet, encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):  # two steps move what begins at zero: the last convolution, then the blocks' own
        optimizer.zero_grad(set_to_none=True)
        image, epsilon = noise(3, 4, 8, 8, seed=step), noise(3, 4, 8, 8, seed=step + 10)
        ids, timesteps = torch.tensor([0, 1, 2]), torch.tensor([100, 500, 900])
        noise_prediction_loss(model, DynamicDDIMScheduler(), image, ids, epsilon, timesteps).backward()
        if step < 2:
            optimizer.step()
    unreached = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unreached == []
    assert bool(encoder.embedding.weight[encoder.null_id].any()) == (size == "small")


@torch.no_grad()
def test_paper_tokens_are_the_outer_product_of_the_vector():
    torch.manual_seed(0)
    encoder = ClassTokenEncoder(num_tokens=None, token_dim=32, vector_dim=32, embedding_dim=16)
    tokens, vector = encoder(torch.arange(3))
    assert tokens.shape == (3, 32, 32) and vector.shape == (3, 32)
    assert torch.equal(tokens, vector[:, :, None] * vector[:, None])
    assert not encoder.embedding.weight[2].any() and encoder.embedding.weight[:2].any(dim=1).all()
    # the null vector comes from the biases: it is neither zero nor that of a class
    assert vector[2].abs().max() > 1e-3 and (vector[2] - vector[:2]).abs().amax(dim=1).min() > 1e-3


@torch.no_grad()
def test_learned_tokens_are_one_table_row_a_class():
    torch.manual_seed(0)
    encoder = ClassTokenEncoder(num_tokens=3, token_dim=5, vector_dim=7, embedding_dim=6)
    tokens, vector = encoder(torch.tensor([2, 0, 1, 0]))
    assert tokens.shape == (4, 3, 5) and vector.shape == (4, 7) and torch.equal(tokens[1], tokens[3])
    torch.testing.assert_close(vector[1], vector[3])
    for rows in (tokens[:3], vector[:3]):
        assert torch.pdist(rows.flatten(1), p=math.inf).min() > 1e-3


def test_classes_have_names():
    encoder = ClassTokenEncoder(class_names=("healthy", "oedema", "core"))
    assert [encoder.class_id(name) for name in ("healthy", "oedema", "core", None)] == [0, 1, 2, 3]
    assert encoder.null_id == 3 and encoder.embedding.num_embeddings == 4
    with pytest.raises(ValueError, match="class 'sick' is unknown"):
        encoder.class_id("sick")
    for names in (("healthy",), ("healthy", "healthy"), ()):
        with pytest.raises(ValueError, match="two or more different names"):
            ClassTokenEncoder(class_names=names)
    with pytest.raises(ValueError, match="token_dim 64 must equal vector_dim 192"):
        ClassTokenEncoder(num_tokens=None)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        ClassTokenEncoder(num_tokens=0)
    with pytest.raises(ValueError, match="size is 'medium'"):
        class_token_encoder("medium")
