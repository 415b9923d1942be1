"""The guide for those who come from a Trainer: each row's code runs, and asserts what it says."""

import ast
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "migrating.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_, *SECTIONS = re.split(r"^### ", GUIDE.read_text(), flags=re.MULTILINE)
ROWS = {title: BLOCK.findall(text) for title, text in (s.split("\n", 1) for s in SECTIONS)}
START = BLOCK.findall(GUIDE.read_text())[0]

# What people have used: each name is in the heading of a row.
NAMES = """
fit validate test predict max_epochs max_steps max_time min_epochs min_steps accelerator devices
gradient_clip_val gradient_clip_algorithm accumulate_grad_batches check_val_every_n_epoch
val_check_interval limit_train_batches limit_val_batches limit_test_batches num_sanity_val_steps
ModelCheckpoint EarlyStopping LearningRateMonitor default_root_dir log_every_n_steps fast_dev_run
overfit_batches detect_anomaly deterministic seed_everything benchmark inference_mode lr_find
scale_batch_size LightningDataModule estimated_stepping_batches ckpt_path
optim learning_rate weight_decay lr_scheduler_type warmup_steps warmup_ratio reduce_lr_on_plateau
num_train_epochs eval_strategy save_strategy logging_strategy logging_first_step
load_best_model_at_end metric_for_best_model greater_is_better save_total_limit compute_metrics
compute_loss label_smoothing_factor tf32 data_collator dataloader_num_workers dataloader_pin_memory
auto_find_batch_size underflow_overflow resume_from_checkpoint max_grad_norm
gradient_accumulation_steps
""".split()


@pytest.mark.filterwarnings("ignore:Error detected in MulBackward0")  # the anomaly of one row
@pytest.mark.parametrize("title", ROWS)
def test_the_code_of_a_row_runs(title, tmp_path, monkeypatch):
    """After the block that each starts from, the row's block runs, and asserts something of it."""
    monkeypatch.chdir(tmp_path)
    (block,) = ROWS[title]
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block)))
    namespace = {"__name__": "migrating"}
    for code in (START, block):
        exec(compile(code, f"{GUIDE.name}: {title}", "exec"), namespace)  # noqa: S102


@pytest.mark.parametrize("name", NAMES)
def test_what_people_have_used_has_a_row(name):
    """Each name of a Trainer's argument or callback is in a heading."""
    assert any(re.search(rf"\b{name}\b", title) for title in ROWS)
