// Bar and line charts as SVG text, readable on light and dark pages (they bring their white ground
// along).
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace vernier::cli {

/// A horizontal line across a chart.
struct Reference {
  double value = 0;
  std::string label;
};

/// Vertical bars in groups, a bar a series.
struct GroupedBars {
  struct Series {
    std::string name;
    std::vector<std::optional<double>> values;  ///< one a group
    /// Lowest and highest, one a group, drawn as whiskers; or none.
    std::vector<std::pair<double, double>> spreads = {};
  };
  std::string title, subtitle;
  std::string unit;                 ///< of the axis
  std::vector<std::string> groups;  ///< labels; '\n' starts another line
  std::vector<Series> series;
  std::vector<Reference> references;
};

/// Horizontal bars of stacked parts, in groups.
struct StackedBars {
  struct Bar {
    std::string name;
    std::vector<double> parts;  ///< one a part of the chart, 0 where it has none
    std::string label;          ///< behind the bar
  };
  struct Group {
    std::string name;
    std::vector<Bar> bars;
  };
  std::string title, subtitle;
  std::string unit;
  std::vector<std::string> parts;
  std::vector<Group> groups;
  std::optional<Reference> reference;  ///< a vertical line
};

/// Lines over a numeric axis.
struct LineChart {
  struct Series {
    std::string name;
    std::vector<std::pair<double, double>> points;  ///< from left to right
  };
  std::string title, subtitle;
  std::string x_unit, unit;
  std::vector<Series> series;
  std::vector<Reference> references;
};

std::string to_svg(const LineChart& chart);
std::string to_svg(const GroupedBars& chart);
std::string to_svg(const StackedBars& chart);

}  // namespace vernier::cli
