"""safetensors files: the library reads what we write, we read what it writes, and damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sftjax.config import UserError
from sftjax.hf.tensors import INDEX, Tensor, read, read_dir, write, write_dir

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6, dtype=np.float16),
    "scalar": np.array(7.0, np.float32),
    "c": np.arange(10).reshape(2, 5).astype(ml_dtypes.bfloat16),
}


def tensors(arrays):
    return {name: Tensor(x.dtype, x.shape, lambda x=x: x) for name, x in arrays.items()}


def test_written_is_read_back_by_us_and_by_the_library(tmp_path):
    file = tmp_path / "x.safetensors"
    write(file, tensors(ARRAYS))
    for name, stored in read(file).items():
        assert stored.dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(stored.view(), ARRAYS[name])
    with safe_open(file, framework="numpy") as f:
        assert set(f.keys()) == set(ARRAYS) and f.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(f.get_tensor("a"), ARRAYS["a"])


def test_what_the_library_writes_is_read(tmp_path):
    plain = {name: x for name, x in ARRAYS.items() if name != "c"}
    save_file(plain, tmp_path / "x.safetensors")
    assert {name: stored.view().tolist() for name, stored in read(tmp_path / "x.safetensors").items()} == {
        name: x.tolist() for name, x in plain.items()
    }


def test_shards_hold_the_same_as_one_file(tmp_path):
    write_dir(tmp_path, tensors(ARRAYS), max_shard_bytes=30)
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert shards == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in ARRAYS.values())
    assert set(index["weight_map"]) == set(ARRAYS)
    for name, stored in read_dir(tmp_path).items():
        assert stored.file.name == index["weight_map"][name]
        np.testing.assert_array_equal(stored.view(), ARRAYS[name])


@pytest.mark.parametrize("keep", [0, 5, 40, -1], ids=["nothing", "no length", "half a header", "one byte short"])
def test_a_truncated_file_is_named(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    write(file, tensors(ARRAYS))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: .*fetch it again"):
        read_dir(tmp_path)


def test_other_damage_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    write(file, tensors(ARRAYS))
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"dtype"', b'"dtype:'))
    with pytest.raises(UserError, match="header is corrupt"):
        read_dir(tmp_path)
    file.write_bytes(whole.replace(b'"shape": [3, 4]', b'"shape": [4, 4]'))
    with pytest.raises(UserError, match="gives a 48 bytes"):
        read_dir(tmp_path)
    file.write_bytes(whole.replace(b'"F32"', b'"U32"'))
    with pytest.raises(UserError, match="a is U32; supported are F32, F16, BF16"):
        read_dir(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_dir(tmp_path)


def test_a_directory_without_its_files_says_which(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"safetensors only.*pytorch_model\.bin"):
        read_dir(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(UserError, match="not a safetensors index"):
        read_dir(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "z": "one.safetensors"}}')
    with pytest.raises(UserError, match=r"names one\.safetensors, which is not there"):
        read_dir(tmp_path)
    write(tmp_path / "one.safetensors", tensors(ARRAYS))
    with pytest.raises(UserError, match=r"names z, which one\.safetensors does not hold"):
        read_dir(tmp_path)
