"""The guide for those who come from a Trainer: each row's code runs, and asserts what it says."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from hub import local_hub, run_beside

GUIDE = Path(__file__).parents[1] / "docs" / "migrating.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_, FIRST, *SECTIONS = re.split(r"^## ", GUIDE.read_text(), flags=re.MULTILINE)


def rows_of(section):
    """For each row of a section: the blocks that it starts from, and those that it has."""
    intro, *rows = re.split(r"^### ", section, flags=re.MULTILINE)
    start = BLOCK.findall(FIRST) + BLOCK.findall(intro)
    for row in rows:
        title, text = row.split("\n", 1)
        yield title, start, BLOCK.findall(text)


ROWS = {title: (start, blocks) for s in SECTIONS for title, start, blocks in rows_of(s)}

# What people have used: each name is in the heading of a row.
NAMES = """
fit validate test predict max_epochs max_steps max_time min_epochs min_steps accelerator devices
cpu cuda mps xpu auto 64-true 32-true 16-true bf16-true 16-mixed bf16-mixed float8
gradient_clip_val gradient_clip_algorithm accumulate_grad_batches check_val_every_n_epoch
val_check_interval limit_train_batches limit_val_batches limit_test_batches num_sanity_val_steps
logger TensorBoardLogger WandbLogger MLFlowLogger CSVLogger enable_progress_bar
ModelCheckpoint EarlyStopping LearningRateMonitor ModelSummary DeviceStatsMonitor
default_root_dir log_every_n_steps fast_dev_run
overfit_batches detect_anomaly deterministic seed_everything benchmark inference_mode lr_find
profiler StochasticWeightAveraging BackboneFinetuning sync_batchnorm
scale_batch_size LightningDataModule estimated_stepping_batches ckpt_path strategy num_nodes
automatic_optimization use_distributed_sampler DistributedSampler set_epoch worker_init_fn
optim adamw_torch_fused adafactor adamw_torch_8bit schedule_free_adamw learning_rate weight_decay
lr_scheduler_type warmup_steps warmup_ratio reduce_lr_on_plateau
num_train_epochs eval_strategy save_strategy logging_strategy logging_first_step
load_best_model_at_end metric_for_best_model greater_is_better save_total_limit compute_metrics
compute_loss label_smoothing_factor neftune_noise_alpha gradient_checkpointing fp16 bf16 tf32
group_by_length data_collator DataCollatorWithPadding
dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
auto_find_batch_size underflow_overflow report_to PEFT push_to_hub resume_from_checkpoint
max_grad_norm gradient_accumulation_steps fsdp deepspeed TrainerCallback optimizer_in_bwd SAM
create_optimizer configure_optimizer
""".split()


@pytest.mark.filterwarnings("ignore:Error detected in MulBackward0")  # the anomaly of one row
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.parametrize("title", ROWS)
def test_the_code_of_a_row_runs(title, tmp_path, monkeypatch):
    """After what it starts from, the row's block runs, asserts something, and leaves no switch."""
    monkeypatch.chdir(tmp_path)
    start, (block,) = ROWS[title]
    tree = ast.parse(block)
    assert any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and not importlib.util.find_spec(node.names[0].name):
            pytest.skip(f"needs {node.names[0].name}, of the extra examples-all")
    if "push_to_hub" in title:
        run_with_a_hub("\n".join([*start, block]), tmp_path)
        return
    namespace, switches = {"__name__": "migrating"}, torch.backends.cudnn.benchmark
    for code in (*start, block):
        exec(compile(code, GUIDE.name, "exec"), namespace)  # noqa: S102
    assert torch.backends.cudnn.benchmark == switches
    assert not torch.are_deterministic_algorithms_enabled()


def run_with_a_hub(code, folder):
    """The hub of the row is one on this machine, which has got the weights at the end."""
    pytest.importorskip("huggingface_hub")
    with local_hub() as hub:
        done = run_beside(hub, code, folder)
    assert done.returncode == 0, done.stderr
    wanted = (folder / "runs/hub/1/model.safetensors").read_bytes()
    assert hub.repos == {"me/digits": {"model.safetensors": wanted}}


@pytest.mark.parametrize("name", NAMES)
def test_what_people_have_used_has_a_row(name):
    """Each name of a Trainer's argument or callback is in a heading."""
    assert any(re.search(rf"(?<!\w){name}(?!\w)", title) for title in ROWS)


def test_no_two_rows_have_one_heading():
    """A row that another overwrote would not be run."""
    headings = re.findall(r"^### (.*)$", GUIDE.read_text(), flags=re.MULTILINE)
    assert sorted(headings) == sorted(ROWS)
