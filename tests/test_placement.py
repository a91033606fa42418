import pytest
import torch
from conftest import tiny_ast_config
from transformers import ASTModel

from peft_softmoa.experts import PatchGrid
from peft_softmoa.placement import find_patch_grid


def test_patch_grid_of_the_audio_spectrogram_transformer():
    config = tiny_ast_config(num_mel_bins=128, max_length=90, frequency_stride=10, time_stride=12)
    grid = find_patch_grid(config.to_dict())
    assert grid == PatchGrid(class_tokens=2, height=12, width=7)
    embeddings = ASTModel(config).embeddings
    assert grid[1:] == embeddings.get_shape(config)
    assert embeddings.position_embeddings.shape[1] == 2 + 12 * 7


def test_tokens_of_the_patch_grid_are_where_it_says():
    """A louder patch of the spectrogram changes the token that the grid gives it, and no other."""
    config = tiny_ast_config()
    embeddings = ASTModel(config).embeddings.eval()
    _, height, width = find_patch_grid(config.to_dict())
    quiet = torch.zeros(1, config.max_length, config.num_mel_bins)
    for row, column in ((0, 0), (3, 2), (height - 1, width - 1)):
        loud = quiet.clone()
        loud[:, 16 * column : 16 * (column + 1), 16 * row : 16 * (row + 1)] = 1.0
        changed = (embeddings(loud) != embeddings(quiet)).any(dim=-1)[0].nonzero().flatten().tolist()
        assert changed == [2 + row * width + column]


def test_patch_grid_of_other_models():
    for config in ({"model_type": "wav2vec2"}, {}):
        with pytest.raises(ValueError, match="`patch_grid` is known for models of type audio-spectrogram-transformer"):
            find_patch_grid(config)
