"""Which configs and chips the kernels fit, and that the TPU compiler takes them."""

FITS = dict(d_k=128, d_v=1536, n_code=512, block_len=512, mem_len=512, dtype=jnp.bfloat16, n_head=1)


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "TPU v5 lite", None),
        ({}, "TPU v6 lite", None),
        (dict(d_v=256, n_code=128, block_len=128, mem_len=128), "TPU v4", "no kernels for TPU v4"),
        (dict(attn_type="full"), "TPU v5 lite", "config.model.attn_type=full has no codes"),
        (dict(mem_len=1024), "TPU v5 lite", "config.model.mem_len=1024 differs from config.model.block_len=512"),
        (dict(d_k=64), "TPU v5 lite", None),
        (dict(block_len=192, mem_len=192), "TPU v5 lite", "config.model.block_len=192 is not a multiple of 128"),
        (dict(d_v=8192), "TPU v5", "MiB of VMEM"),
        ({}, "NVIDIA H100 80GB HBM3", "no kernels for NVIDIA H100"),
        (dict(d_v=1000), "cpu", None),
    ],
    ids=str,
)
def test_whether_a_config_fits_is_known_before_anything_is_compiled(changes, device, reason):
    config = TransformerConfig().replace(**(FITS | changes))
    found = why_not(config, device)
    assert found is None if reason is None else reason in (found or "")
    assert implementation(config) == "xla"
    if config.attn_type == "vq":
        assert implementation(config.replace(attention="pallas")) == "pallas"


def test_kernels_need_whole_updates_and_whole_heads_on_a_device():
    config = TransformerConfig().replace(**FITS)
    assert "config.mesh.sequence=2" in (why_not(config, "TPU v5 lite", n_sequence=2) or "")
    assert "config.mesh.model=2" in (why_not(config, "TPU v5 lite", n_model=2) or "")
    several = config.replace(head_type="mha", n_head=4)
    assert why_not(several, "TPU v5 lite", n_model=2) is None
    assert why_not(several, "TPU v5 lite", n_model=3) is not None


def test_a_run_says_which_attention_it_takes_and_refuses_what_cannot_be(eight_devices):
    mesh = make_mesh(MeshSettings(), eight_devices[:1])
    assert attention_line(small_config(), mesh) == "config.model.attention=auto takes xla"
    check_attention(core_config(), mesh)
    with pytest.raises(UserError, match=r"^config.model.attention=pallas: config.model.mem_len=8 differs .*; give xla"):
        check_attention(core_config().replace(mem_len=8), mesh)


class OnChip(Placement):
    """One device of a topology."""

    def __init__(self, device):
        self._device = device

    def device_kind(self):
        return self._device.device_kind


def compile_for_chip(config: TransformerConfig, device) -> str:
    """The program of `compiled` on a device that need not be here."""
    sharding = SingleDeviceSharding(device)

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    given = abstract(jax.eval_shape(lambda: arrays_of(config, 0)))
    doc_ids = abstract(jax.ShapeDtypeStruct((N_BLOCKS, N_ROWS, config.block_len), jnp.int32))
    state = abstract(jax.eval_shape(lambda: initial_state(config, N_ROWS)))
    with placed_by(OnChip(device)):
        lowered = compiled.__wrapped__(config).lower(**given, doc_ids=doc_ids, state=state)
    return lowered.compile().as_text() or ""


@pytest.mark.slow(20)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_tpu_compiler_takes_the_kernels(topology, monkeypatch):
    for variable, value in LIBTPU_ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    (device, *_) = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    small = dict(attention="pallas", d_k=64, d_v=128, n_code=64, block_len=256, mem_len=256)
    for changes in (
        dict(n_head=1, dtype=jnp.bfloat16),
        dict(head_type="mqa", n_head=2, window_bias=1.0),
        dict(head_type="mha", n_head=2, agg_cache=False, grad_thru_cache=False, dtype=jnp.bfloat16),
    ):
        config = TransformerConfig().replace(**small, **changes)
        assert why_not(config, device.device_kind) is None
        assert shape_of(config, device.device_kind, N_BLOCKS, N_ROWS, False).tile == 256
        text = compile_for_chip(config, device)
        kernels = ["tvq_forward", "tvq_backward"] + ["tvq_caches"] * config.agg_cache
        assert all(f"%{name}" in text or f"{name}_" in text for name in kernels)
