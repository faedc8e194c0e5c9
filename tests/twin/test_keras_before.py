"""A `.keras` file that was written before the package had rooms still opens, and answers as it did."""

import keras
import numpy as np
from support.before import BEFORE

import deit.model_keras


def test_a_keras_file_answers_as_it_did():
    model = keras.saving.load_model(BEFORE / "student.keras")
    assert isinstance(model, deit.model_keras.TFDeiTForImageClassificationWithTeacher)
    stored = np.load(BEFORE / "keras.npz")
    found = keras.ops.convert_to_numpy(model(stored["pixels"], training=False).logits)
    np.testing.assert_allclose(found, stored["logits"], rtol=0, atol=1e-5)
