"""Addresses as the texts that a dual encoder compares photos with, and the scores that follow (paper 002, Sec. 4.1)."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from addressvlm.addresses import Address
from addressvlm.baselines.dual_encoder import DualEncoder
from addressvlm.errors import InputError


class Candidates:
    """The addresses that an answer can be, each different text encoded once.

    Attributes:
        texts: the different texts, in the order of the list.
        index: number of each address's text, int64 (addresses,).
    """

    def __init__(self, encoder: DualEncoder, addresses: Iterable[Address]) -> None:
        """Addresses whose texts are the same, such as one that is listed twice, get the same score.

        Raises:
            InputError: there is no address.
        """
        written = [address.text() for address in addresses]
        if not written:
            raise InputError("there is no address to compare photos with: give a gazetteer that has some.")
        self.texts = list(dict.fromkeys(written))
        at = {text: number for number, text in enumerate(self.texts)}
        self.index = np.array([at[text] for text in written])
        self.encoder = encoder
        self._vectors_TD = encoder.encode_texts(self.texts)

    @torch.inference_mode()
    def scores(self, images: Sequence[Any]) -> np.ndarray:
        """Similarity / temperature of photos (PIL images) and addresses, float64 (photos, addresses).

        It is ln of the probability that the photo is of the address up to a constant, as the contrastive loss defines it.
        """
        found = self.encoder.scale.float() * self.encoder.encode_images(images) @ self._vectors_TD.T
        return found.double().cpu().numpy()[:, self.index]
