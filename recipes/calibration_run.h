// One pass of calibration data through a model.
#pragma once

#include <vernier/calibration/statistics_file.h>
#include <vernier/recipes/models/text_model.h>
#include <vernier/recipes/token_dataset.h>

#include <functional>

namespace vernier {

/// Adds samples [statistics.first_sample + statistics.samples, statistics.first_sample +
/// statistics.planned) of the data to the statistics of every quantized layer's input.
///
/// Each sample goes through the model by itself, on the CPU several at a time on one thread each:
/// what is gathered then depends neither on a batch size nor on the number of threads or the order,
/// and memory does not grow with the number of samples. `after_block` is called every few samples,
/// with statistics that are whole so far: to save and to show progress. Throws Error as
/// TokenDataset::read, and naming the layer when it is given NaN or infinite values.
void collect_statistics(TextModel& model, const TokenDataset& data, ModelStatistics& statistics,
                        const std::function<void(const ModelStatistics&)>& after_block = nullptr);

/// Empty statistics of a model for `count` samples from `first` of the data. Throws Error when they
/// are not all there.
ModelStatistics plan_statistics(const TextModel& model, const TokenDataset& data, int64_t first,
                                int64_t count);

}  // namespace vernier
