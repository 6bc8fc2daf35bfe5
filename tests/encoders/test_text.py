import pytest
import torch

from fw_train.encoders.text import load_text_encoder


def test_hashed_words_are_vectors_of_their_own():
    encoder = load_text_encoder("hash:64")
    red, both, again = encoder.encode(["red", "a Red ball.", "ball, a"])
    assert red.shape == (1, 64)
    assert red.dtype == torch.float32
    assert torch.equal(both[1], red[0])
    assert torch.equal(both[[2, 0]], again)
    torch.testing.assert_close(both.square().mean(dim=1), torch.ones(3))  # as large as what networks are fed with
    assert (both @ both.T / 64 - torch.eye(3)).abs().max() < 0.5
    assert abs(both.mean()) < 0.16


def test_no_text_is_one_token():
    empty, blank, sign = load_text_encoder("hash:32").encode(["", "  \n", "?"])
    assert empty.shape == (1, 32)
    assert torch.equal(empty, blank)
    assert torch.equal(empty, sign)


def test_words_of_every_language_and_length_count():
    words, long = load_text_encoder("hash:8").encode(["ein grüner Würfel 立方体", "word " * 700])
    assert len(words) == 4
    assert len(long) == 512


def test_hashes_are_the_same_everywhere():
    (found,) = load_text_encoder("hash:4").encode(["wall"])
    torch.testing.assert_close(found, 2 * torch.tensor(WALL), rtol=0, atol=1e-5)


def test_the_name_is_in_the_fingerprint():
    assert load_text_encoder("hash:64").fingerprint_facts == {"encoder": "hash:64", "version": 2}
    for name in ("hash:0", "hash:", "hash:-4", "hash"):
        with pytest.raises(ValueError, match="text without weights is hash:D, as hash:64"):
            load_text_encoder(name)
    with pytest.raises(ValueError, match="nowhere holds no text encoder"):
        load_text_encoder("nowhere")


WALL = [[0.53972, 0.39242, -0.25517, -0.69971]]
