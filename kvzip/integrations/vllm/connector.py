"""The KV connector that vLLM creates once in the scheduler and once in each worker."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.logger import init_logger

from kvzip.errors import ModelError
from kvzip.hf.described import describe
from kvzip.hf.prompts import Prompts
from kvzip.integrations.vllm import check_version
from kvzip.integrations.vllm.library import Library, options_of
from kvzip.integrations.vllm.messages import Reports, Step
from kvzip.integrations.vllm.prompts import Questions
from kvzip.integrations.vllm.room import Room
from kvzip.integrations.vllm.scheduling import Contexts, Scheduling
from kvzip.integrations.vllm.working import Working

logger = init_logger(__name__)


class KVZipConnector(KVConnectorBase_V1, SupportsHMA):
    """Serves the contexts of a store. Options, in kv_connector_extra_config:

    store: the folder of .kvz files.  max_context_bytes: of pairs that are open at a time (by default 4 GiB).
    Raises ModelError or InputError where this engine can't serve contexts right.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        check_version()
        check_config(vllm_config)
        block_size = one_block_size(kv_cache_config)
        model = vllm_config.model_config
        described = describe(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
        self._scheduling: Scheduling | None = None
        self._working: Working | None = None
        if role is KVConnectorRole.SCHEDULER:
            folder, limit = options_of(vllm_config.kv_transfer_config.kv_connector_extra_config)
            library = Library(folder, described.fingerprint())
            self._scheduling = Scheduling(
                library,
                Questions(Prompts(described.tokenizer)),
                Contexts(limit, vllm_config.parallel_config.world_size),
                Room(block_size, model.max_model_len, described.max_positions),
            )
            logger.info("kvzip serves the contexts of %s to %s", folder, library.fingerprint)
        else:
            groups = [group.layer_names for group in kv_cache_config.kv_cache_groups]
            self._working = Working(vllm_config, described, groups, block_size)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @property
    def scheduling(self) -> Scheduling:
        assert self._scheduling is not None
        return self._scheduling

    @property
    def working(self) -> Working:
        assert self._working is not None
        return self._working

    # the scheduler's side, in the order of its calls

    def on_new_request(self, request: Any) -> None:
        if reason := self.scheduling.arrived(request):
            logger.warning("request %s refused: %s", request.request_id, reason)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.scheduling.num_claimed(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.scheduling.placed(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        return self.scheduling.take_step()

    def update_connector_output(self, connector_output: Any) -> None:
        if isinstance(reports := connector_output.kv_connector_worker_meta, Reports):
            self.scheduling.answered(reports)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.scheduling.left(request.request_id)
        return False, None

    # a worker's side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self.working.attach(self._vllm_config.compilation_config.static_forward_context)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """The one hook that always precedes the forward pass: what the step says is done here."""
        assert isinstance(kv_connector_metadata, Step)
        self.working.apply(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Portable contexts go into the paged cache; what a handle stands for never does."""
        self.working.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: all is there when the forward pass begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is stored."""

    def wait_for_save(self) -> None:
        """Nothing is stored."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        refused = set(self.working.take_refused())
        return KVConnectorTransferResults(finished_recving=refused, failed_recving=set(refused))

    def build_connector_worker_meta(self) -> Reports | None:
        opened = self.working.take_opened()
        return Reports(opened) if opened else None

    def shutdown(self) -> None:
        if self._working is not None:
            self._working.close()


def check_config(config: Any) -> None:
    """Raises ModelError for an engine whose answers behind a context could be wrong."""
    model, cache, parallel, transfer = (
        config.model_config, config.cache_config, config.parallel_config, config.kv_transfer_config,
    )  # fmt: skip
    wrong = {
        "kv_load_failure_policy 'recompute' would compute a handle as text: leave it at 'fail'": (
            transfer.kv_load_failure_policy != "fail"
        ),
        "speculative decoding is not supported with contexts: leave it out": config.speculative_config is not None,
        "LoRA adapters are not supported with contexts: leave them out": config.lora_config is not None,
        "another configuration than the model's own (hf_overrides, hf_config_path) is not supported: leave it out": (
            bool(model.hf_overrides) or model.hf_config_path not in (None, model.model)
        ),
        f"the tokenizer {model.tokenizer} is not the model's own: leave it out": model.tokenizer != model.model,
        "latent attention (MLA) is not supported": model.use_mla,
        "encoder-decoders are not supported": model.is_encoder_decoder,
        f"a KV cache of {cache.cache_dtype} is not supported: take kv_cache_dtype 'auto'": cache.cache_dtype != "auto",
        "decode context parallelism is not supported: leave it out": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism is not supported: leave it out": (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
    }
    for reason, is_wrong in wrong.items():
        if is_wrong:
            raise ModelError(f"kvzip can't serve contexts here: {reason}")


def one_block_size(kv_cache_config: Any) -> int:
    """Tokens of a block, the same in all groups of layers. Raises ModelError."""
    sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
    if len(sizes) != 1:
        raise ModelError(
            f"kvzip can't serve contexts here: layers have blocks of {sorted(sizes)} tokens, not of one size"
        )
    return int(sizes.pop())
