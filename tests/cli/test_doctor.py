"""`diffctrl doctor`: what works here and why not."""

import json

from diffctrl.zoo import integrity, registry


def test_reports_packages_devices_kernels_and_models(run):
    done = run("doctor", "--json")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["required"]["torch"]
    assert set(report["optional"]) == {"triton", "flash-attn-4", "xformers", "gradio", "ray"}
    assert report["devices"][0]["name"] == "cpu"
    kernels = {row["name"]: row for row in report["kernels"]["cpu"]}
    assert kernels["sdpa"]["works"]
    assert kernels["gathered"]["works"]
    assert all(row["works"] or row["reason"] for row in kernels.values())
    assert set(report["models"]) == set(registry.EMBEDDED)


def test_prints_tables(run):
    done = run("doctor")
    assert done.exit_code == 0
    for text in ("Packages", "Devices", "Attention kernels on cpu", "Embedded models", "gathered"):
        assert text in done.stdout


def test_damaged_weights_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path)
    assert "are not in" in integrity.problem("shapes-sd3")
    folder = tmp_path / "shapes-sd3"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "a.safetensors").write_bytes(b"weights")
    digest = "9b0c1a5ed3b8e2f3e1a0b0b5a1c2d3e4"
    (folder / "metrics.json").write_text(json.dumps({"sha256": {"vae/a.safetensors": digest}}))
    assert "vae/a.safetensors is not the file" in integrity.problem("shapes-sd3")
    (folder / "metrics.json").write_text(json.dumps({"sha256": {}}))
    assert "the weight files are" in integrity.problem("shapes-sd3")
