"""What people have used, feature by feature, and the tests that show that it does what it should.

The first test of a row is the feature's own oracle; the one behind a bar gives it what is wrong.
The code of the table in `docs/migrating.md` is run by `test_migrating.py` besides.
"""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIGHTNING = """
fit                     test_oracle.py::training_without_decorators_equals_the_hand_written_loop | test_errors.py::a_wrong_use_is_an_error_that_teaches
validate, test          test_evaluate.py::figures_do_not_depend_on_the_batch_size test_evaluate.py::several_loaders_are_named_and_measured_apart | test_evaluate.py::an_output_that_cannot_be_measured_is_refused
predict                 test_predict.py::predictions_come_in_the_order_of_the_data | test_predict.py::a_loader_that_shuffles_is_refused
max_epochs, max_steps   test_run.py::limits_are_totals_of_the_clock test_peers.py::lightning_validates_after_these_updates | test_limits.py::epochs_and_steps_that_cannot_be_right_are_refused
min_epochs, min_steps   test_peers.py::lightning_stops_no_sooner
max_time                test_run.py::max_time_ends_a_run_after_the_update_that_passes_it | test_limits.py::a_time_that_cannot_be_right_says_how_to_write_one
accelerator             test_device.py::auto_is_the_accelerator_where_there_is_one | test_device.py::a_device_that_is_not_there_is_an_error_when_it_is_asked_for
devices, a list         test_device.py::of_a_list_each_process_gets_its_own | test_device.py::of_a_list_each_process_gets_its_own
64-, 32-, 16-, bf16-true  decorators/test_precision.py::a_true_precision_is_the_model_cast_by_hand | decorators/test_precision.py::a_wrong_precision_is_an_error_that_teaches
16-mixed, bf16-mixed    test_oracle.py::each_decorator_alone_equals_the_hand_written_loop test_nonfinite.py::fp16_whose_scale_falls_for_ever_is_an_error | test_errors.py::a_wrong_use_is_an_error_that_teaches
fp8                     decorators/test_precision.py::float8_is_torchaos | decorators/test_precision.py::a_wrong_precision_is_an_error_that_teaches
gradient_clip_val, algorithm  test_oracle.py::each_decorator_alone_equals_the_hand_written_loop | test_errors.py::a_wrong_use_is_an_error_that_teaches
accumulate_grad_batches int   test_accumulate.py::unequal_micro_batches_give_the_gradient_of_the_one_big_batch | test_errors.py::a_wrong_use_is_an_error_that_teaches
accumulate_grad_batches {epoch: n}  test_accumulate.py::the_window_may_change_by_epoch_and_by_function | test_errors.py::a_wrong_use_is_an_error_that_teaches
check_val_every_n_epoch test_peers.py::lightning_validates_after_these_updates | test_every.py::a_wrong_interval_is_an_error_that_teaches
val_check_interval      test_peers.py::lightning_validates_after_these_updates | test_every.py::a_wrong_interval_is_an_error_that_teaches
limit_train_batches     test_peers.py::lightning_validates_after_these_updates | test_limits.py::a_limit_of_batches_that_cannot_be_right_is_refused
limit_val_, limit_test_batches  test_peers.py::lightning_evaluates_so_many_batches | test_limits.py::a_fraction_needs_a_length
num_sanity_val_steps    debug/test_rehearse.py::a_sanity_check_gives_the_scores_of_the_first_batches debug/test_rehearse.py::the_training_that_follows_is_the_same | debug/test_rehearse.py::a_wrong_use_is_an_error_that_teaches
TensorBoard             observe/test_trackers.py::tensorboard_files_hold_what_was_logged | observe/test_log.py::a_missing_package_is_said_when_the_sink_is_written
W&B                     observe/test_trackers.py::wandbs_own_reader_reads_the_offline_run observe/test_trackers.py::an_offline_run_of_wandb_holds_what_was_logged | observe/test_log.py::a_missing_package_is_said_when_the_sink_is_written
MLflow                  observe/test_trackers.py::mlflows_store_holds_what_was_logged | observe/test_trackers.py::a_store_that_is_not_there_costs_a_warning
CSV, JSONL              observe/test_log.py::one_call_goes_to_every_sink observe/test_log.py::each_record_stays_one_line_whatever_it_is_called | observe/test_log.py::a_full_disk_costs_records_not_the_run
several sinks, none     observe/test_log.py::one_call_goes_to_every_sink observe/test_log.py::logging_changes_nothing_of_the_training | observe/test_log.py::a_sink_that_fails_is_told_once_and_the_run_goes_on
log_every_n_steps       observe/test_log.py::wrap_logs_every_so_often | observe/test_log.py::a_wrong_use_is_an_error_that_teaches
progress bar            observe/test_progress.py::on_a_terminal_of_80_columns_it_redraws_one_line observe/test_progress.py::an_evaluation_has_its_bar_below_and_lines_go_above observe/test_progress.py::where_there_is_no_room_the_last_numbers_give_way observe/test_progress.py::into_a_pipe_it_writes_plain_lines observe/test_progress.py::the_time_that_is_left_leaves_the_first_update_out | observe/test_progress.py::more_metrics_are_shown_by_name
ModelCheckpoint         checkpoint/test_retention.py::neither_the_newest_nor_the_best_ever_goes checkpoint/test_checkpointer.py::wrap_saves_every_so_often_and_at_the_end | checkpoint/test_checkpointer.py::a_wrong_use_is_an_error_that_teaches
EarlyStopping           test_stop.py::it_stops_where_lightning_does test_stop.py::it_stops_as_one_would_by_hand | test_stop.py::a_wrong_use_is_an_error_that_teaches
LearningRateMonitor     observe/test_monitor.py::each_group_has_its_rate_as_the_schedule_left_it | observe/test_monitor.py::a_wrong_use_is_an_error_that_teaches
model summary           observe/test_summary.py::shapes_parameters_and_flops_are_right | observe/test_summary.py::parameters_without_a_shape_are_an_error_that_teaches
device stats            observe/test_monitor.py::the_row_of_the_device_is_of_plausible_numbers observe/test_device_stats.py::the_row_of_the_device_has_its_memory | test_given.py::what_is_no_state
default_root_dir        observe/test_log.py::one_call_goes_to_every_sink checkpoint/test_checkpointer.py::an_empty_folder_has_neither_best_nor_latest
fast_dev_run            debug/test_rehearse.py::a_fast_dev_run_is_the_first_updates_and_an_evaluation debug/test_rehearse.py::a_fast_dev_run_writes_nothing | debug/test_rehearse.py::a_wrong_use_is_an_error_that_teaches
overfit_batches         debug/test_rehearse.py::overfit_trains_on_the_same_few_batches debug/test_rehearse.py::overfit_takes_a_number_or_a_fraction | debug/test_rehearse.py::a_wrong_use_is_an_error_that_teaches
detect_anomaly          decorators/test_anomaly.py::the_operation_is_named_with_its_line
deterministic           test_seed.py::deterministic_sets_what_torch_needs_for_it | test_seed.py::deterministic_is_left_alone_unless_asked_for
seed_everything(workers=True)  test_seed.py::loader_workers_are_seeded | test_seed.py::a_seed_that_numpy_cannot_take_is_refused
benchmark               test_seed.py::deterministic_is_left_alone_unless_asked_for
inference_mode          test_modes.py::inference_mode_or_no_grad
profiler simple         observe/test_timing.py::step_and_run_together_tell_everything_apart | observe/test_timing.py::a_wrong_use_is_an_error_that_teaches
profiler advanced       observe/test_profile.py::the_python_profiler_lists_functions_without_the_loops_body | observe/test_profile.py::a_wrong_use_is_an_error_that_teaches
profiler pytorch        observe/test_profile.py::the_trace_holds_the_updates_that_were_asked_for | observe/test_profile.py::a_wrong_use_is_an_error_that_teaches
LR finder               debug/test_rates.py::the_losses_are_those_of_the_loop_by_hand debug/test_rates.py::the_suggestion_trains_where_the_end_is_known debug/test_rates.py::the_curve_in_the_picture_is_the_curve | debug/test_rates.py::a_wrong_range_is_an_error_that_teaches
batch-size finder       debug/test_memory.py::it_is_the_largest_that_fits debug/test_memory.py::it_finds_where_real_memory_ends | debug/test_memory.py::a_wrong_use_is_an_error_that_teaches
SWA                     decorators/test_averages.py::swa_is_torchs_averaged_model decorators/test_averages.py::update_bn_equals_torchs | decorators/test_averages.py::a_wrong_use_is_an_error_that_teaches
backbone freezing       decorators/test_freeze.py::thawing_equals_the_loop_by_hand | decorators/test_freeze.py::a_wrong_schedule_is_an_error_that_teaches
sync_batchnorm          distributed/test_matrix.py::batch_norm_over_ranks_needs_an_accelerator | distributed/test_matrix.py::batch_norm_over_ranks_needs_an_accelerator
DataModule              test_migrating.py::the_code_of_a_row_runs
estimated_stepping_batches  test_peers.py::lightning_estimates_as_many_updates test_run.py::total_steps_is_what_happens
resume from "last"      checkpoint/test_bitwise_resume.py::a_resumed_run_equals_the_whole_one faults/test_kills.py | checkpoint/test_bitwise_resume.py::what_cannot_work_is_refused_and_changes_nothing
"""
HUGGING_FACE = """
optim by name           optim/test_create.py::an_optimizer_by_name_is_torchs test_peers.py::hugging_faces_names_of_optimizers_lead_to_ours | optim/test_create.py::a_call_that_cannot_be_right_says_what_to_write
optim fused             optim/test_create.py::settings_reach_the_optimizer | optim/test_create.py::a_call_that_cannot_be_right_says_what_to_write
optim muon              optim/test_create.py::muon_beside_adamw_trains_as_by_hand | optim/test_create.py::a_call_that_cannot_be_right_says_what_to_write
optim 8-bit, schedule-free  optim/test_create.py::an_optimizer_of_a_package_trains_as_by_hand | optim/test_create.py::a_package_that_is_not_installed_is_named
weight_decay            test_peers.py::hugging_face_decays_the_same_parameters optim/test_create.py::biases_and_norms_do_not_decay | optim/test_create.py::a_call_that_cannot_be_right_says_what_to_write
lr_scheduler_type       test_peers.py::hugging_faces_schedulers_set_these_rates optim/test_schedules.py::schedules_are_those_of_torch | optim/test_schedules.py::a_name_that_is_near_is_proposed optim/test_schedules.py::a_schedule_that_cannot_be_right_says_what_to_write
warmup_steps, warmup_ratio  optim/test_schedules.py::fractions_and_rests_are_of_the_total | optim/test_schedules.py::a_schedule_that_cannot_be_right_says_what_to_write
reduce on plateau       test_hand_driven.py::a_plateau_scheduler_in_extras_goes_on_after_a_restore | test_regressions.py::a_factory_of_a_scheduler_that_needs_a_score_is_refused
num_train_epochs 2.5    test_peers.py::hugging_face_trains_for_parts_of_epochs | test_limits.py::a_fraction_of_an_epoch_needs_a_length
eval, save, logging strategy, first step  test_peers.py::hugging_face_does_it_after_these_updates test_every.py::it_is_time_when_one_would_say_so | test_every.py::a_wrong_interval_is_an_error_that_teaches
load_best_model_at_end  checkpoint/test_bitwise_resume.py::the_best_is_loaded_at_the_end | checkpoint/test_bitwise_resume.py::load_best_needs_something_to_load
metric_for_best_model, greater_is_better, save_total_limit  checkpoint/test_retention.py::settings_say_how_many checkpoint/test_retention.py::of_equal_scores_the_first_is_the_best_and_nan_never_is | checkpoint/test_checkpointer.py::a_wrong_use_is_an_error_that_teaches
compute_metrics         test_metrics.py::functions_get_everything_at_once_and_keep_nothing | test_evaluate.py::metrics_that_cannot_be_right_are_refused
compute_loss            test_accumulate.py::unequal_micro_batches_give_the_gradient_of_the_one_big_batch | test_errors.py::a_wrong_use_is_an_error_that_teaches
label smoothing         test_peers.py::hugging_face_smooths_labels_so
NEFTune                 decorators/test_noise.py::neftune_is_the_papers_noise | decorators/test_noise.py::wrong_settings_are_told
gradient_checkpointing  decorators/test_activations.py::all_is_bitwise_equal_to_plain_training decorators/test_activations.py::it_saves_memory | decorators/test_activations.py::a_wrong_policy_is_an_error_that_teaches
fp16, bf16              test_oracle.py::each_decorator_alone_equals_the_hand_written_loop | test_errors.py::a_wrong_use_is_an_error_that_teaches
tf32                    decorators/test_precision.py::tf32_is_on_inside_and_as_it_was_outside | decorators/test_precision.py::a_wrong_precision_is_an_error_that_teaches
group_by_length         test_lengths.py::batches_have_little_padding_and_a_random_order test_lengths.py::each_sample_comes_once_and_the_length_is_right | test_lengths.py::a_wrong_use_is_an_error_that_teaches
data collators          test_peers.py::hugging_faces_collator_pads_so test_lengths.py::padding_is_the_loop_that_one_would_write | test_lengths.py::a_wrong_use_is_an_error_that_teaches
dataloader workers, pin memory, prefetch  test_device.py::on_an_accelerator_batches_are_copied_one_ahead test_data_workers.py
underflow_overflow      debug/test_overflow.py::the_first_module_that_makes_it_is_named debug/test_overflow.py::underflow_is_found_where_it_is_asked_for
auto_find_batch_size    decorators/test_microbatch.py::auto_equals_having_known_the_size distributed/test_decorators.py::ranks_agree_on_a_size_that_fits | decorators/test_microbatch.py::a_wrong_use_is_an_error_that_teaches
report_to               observe/test_log.py::one_call_goes_to_every_sink | observe/test_log.py::a_wrong_use_is_an_error_that_teaches
PEFT, LoRA              examples/test_lora.py::a_checkpoint_of_the_adapters_makes_the_whole_model checkpoint/test_export.py::adapters_are_exported_alone | checkpoint/test_export.py::what_does_not_fit_is_reported_and_nothing_loaded
push_to_hub             remote/test_hub.py::the_bytes_of_an_export_arrive remote/test_hub.py::uploads_go_on_behind_a_training | remote/test_hub.py::a_token_that_is_wrong_is_the_clients_own_error
resume_from_checkpoint  checkpoint/test_bitwise_resume.py::a_resumed_run_equals_the_whole_one | checkpoint/test_bitwise_resume.py::what_cannot_work_is_refused_and_changes_nothing
"""
LLM = """
create_optimizer        optim/test_create.py::an_optimizer_by_name_is_torchs | optim/test_create.py::a_call_that_cannot_be_right_says_what_to_write
configure_optimizer     optim/test_create.py::biases_and_norms_do_not_decay test_peers.py::hugging_face_decays_the_same_parameters | test_given.py::other_things_in_the_wrong_place
warmup + cosine         optim/test_schedules.py::warmup_then_a_decay_is_the_trainers_schedule | optim/test_schedules.py::a_schedule_that_cannot_be_right_says_what_to_write
accumulation, clipping, AMP  test_oracle.py::any_composition_equals_the_hand_written_loop test_orders.py::all_720_orders_of_six_decorators_equal_the_hand_written_loop
best validation loss    checkpoint/test_bitwise_resume.py::the_best_is_loaded_at_the_end | checkpoint/test_checkpointer.py::a_wrong_use_is_an_error_that_teaches
tutorial: SGD, AdamW    examples/test_tutorial.py::sgd_is_torchs examples/test_tutorial.py::adamw_is_torchs
tutorial: the loop      examples/test_tutorial.py::a_network_trained_with_them_is_the_one_trained_with_torchs examples/test_tutorial.py::the_loop_is_the_composed_step
tutorial: the script    examples/test_tutorial.py::the_comparison_runs_and_draws
"""
PIECES = """
param_groups, routing   optim/test_combined.py::rules_route_to_optimizers_as_by_hand optim/test_groups.py::every_parameter_is_in_one_group_whatever_the_rules | optim/test_groups.py::a_rule_that_cannot_be_right_says_what_to_write
optimizer in backward   decorators/test_in_backward.py::any_torch_optimizer_gives_the_same_bits decorators/test_in_backward.py::gradients_do_not_exist_together | decorators/test_in_backward.py::what_needs_all_gradients_is_refused
schedules chain         optim/test_schedules.py::chaining_is_associative optim/test_schedules.py::with_schedule_sets_any_value_of_the_param_groups | optim/test_schedules.py::only_schedules_chain
plot_schedule           optim/test_plot.py::the_curve_in_the_picture_is_the_schedule | optim/test_plot.py::what_cannot_be_drawn_is_an_error
log, one call           observe/test_log.py::one_call_goes_to_every_sink | observe/test_log.py::a_wrong_use_is_an_error_that_teaches
fetched in batches      observe/test_log.py::records_wait_for_their_numbers_and_keep_their_order observe/test_device_stats.py::nothing_waits_for_the_device
one rank writes         observe/test_log.py::one_rank_writes
closing flushes         observe/test_log.py::a_log_that_nobody_closed_loses_nothing observe/test_log.py::every_record_is_on_disk_when_the_process_is_killed
no secrets              observe/test_log.py::secrets_and_environments_are_nowhere_in_the_folder
throughput, MFU, padding  observe/test_throughput.py::padding_is_no_token observe/test_throughput.py::flops_are_counted_once_and_go_with_the_samples | observe/test_throughput.py::a_wrong_use_is_an_error_that_teaches
profile, timing         observe/test_profile.py::the_trace_holds_the_updates_that_were_asked_for observe/test_timing.py::step_and_run_together_tell_everything_apart | observe/test_profile.py::a_wrong_use_is_an_error_that_teaches
lk.plot                 observe/test_plot_runs.py::a_run_that_was_logged_is_drawn | observe/test_plot_runs.py::a_wrong_use_is_an_error_that_teaches
with_microbatch("auto") decorators/test_microbatch.py::the_gradient_is_that_of_the_whole_batch decorators/test_microbatch.py::auto_equals_having_known_the_size | decorators/test_microbatch.py::a_wrong_use_is_an_error_that_teaches
debug.check             debug/test_check.py::a_planted_mistake_is_found debug/test_check.py::a_sound_training_has_no_mistakes | debug/test_check.py::a_wrong_use_is_an_error_that_teaches
every                   test_every.py::it_is_time_when_one_would_say_so test_every.py::a_resumed_run_is_answered_as_the_whole | test_every.py::a_wrong_interval_is_an_error_that_teaches
with_activation_checkpointing  decorators/test_activations.py::selective_checkpointing_does_not_compute_what_it_keeps | decorators/test_activations.py::a_wrong_policy_is_an_error_that_teaches
with_sam                decorators/test_sam.py::sam_is_the_papers_loop | decorators/test_sam.py::a_schedule_goes_with_it_and_wrong_settings_are_told
with_freeze             decorators/test_freeze.py::what_is_frozen_does_not_move_at_all | decorators/test_freeze.py::a_wrong_schedule_is_an_error_that_teaches
with_grad_noise         decorators/test_noise.py::gradient_noise_is_the_papers decorators/test_noise.py::the_noise_has_the_variance_it_says | decorators/test_noise.py::wrong_settings_are_told
examples/migrate        examples/test_migrate.py::each_form_trains_the_weights_of_the_plain_loop examples/test_migrate.py::the_lines_are_counted_and_printed
costs nothing           test_budgets.py::python_calls_of_an_update_stay_within_their_budget test_budgets.py::updates_keep_no_memory
imports no extras       test_architecture.py::importing_loopkit_imports_no_extras_and_changes_nothing
numbers in a mapping    test_accumulate.py::numbers_of_the_host_are_means_as_tensors_are test_evaluate.py::numbers_of_the_host_are_means_as_tensors_are | test_stop.py::a_wrong_use_is_an_error_that_teaches
skips without end       test_nonfinite.py::skipping_without_end_is_an_error
a run without an update test_run_again.py::other_data_with_the_same_epochs_is_warned_of test_run_again.py::a_finished_training_that_is_run_again_is_not_warned_of
"""
LINES = [*map(str.strip, (LIGHTNING + HUGGING_FACE + LLM + PIECES).split("\n"))]
ROWS = dict(re.match(r"(.*?) +(\S+\.py.*)", line).groups() for line in LINES if line)


def names_in(path):
    """The tests of a file, without their beginning."""
    tree = ast.parse((HERE / path).read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {f.name.removeprefix("test_") for f in functions if f.name.startswith("test_")}


@pytest.mark.parametrize("row", ROWS)
def test_each_row_has_its_tests(row):
    """The tests that a row names are there."""
    for test in ROWS[row].replace("|", " ").split():
        path, _, name = test.partition("::")
        assert not name or name in names_in(path), test
        assert (HERE / path).exists(), test


def test_no_row_is_there_twice():
    """A row that another overwrote would not be looked at."""
    assert len(ROWS) == sum(map(bool, LINES))
