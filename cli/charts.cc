#include <vernier/cli/charts.h>
#include <vernier/cli/console.h>
#include <vernier/kernels/error.h>

#include <algorithm>
#include <cmath>

namespace vernier::cli {
namespace {

// Told apart in print and by the colour-blind; the first one is the one that is looked for.
constexpr const char* kColors[] = {"#d55e00", "#0072b2", "#56b4e9", "#009e73",
                                   "#cc79a7", "#e69f00", "#7f7f7f", "#222222"};
constexpr const char* kInk = "#1b1f24";
constexpr const char* kFaintInk = "#57606a";
constexpr const char* kGrid = "#d8dee4";

const char* color(size_t index) { return kColors[index % std::size(kColors)]; }

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

// Width of a text of the sans-serif fonts that a viewer may pick, rather too much than too little.
double width_of(const std::string& text, double size) {
  return 0.6 * size * static_cast<double>(text.size());
}

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines = {""};
  for (const char c : text) {
    if (c == '\n') {
      lines.emplace_back();
    } else {
      lines.back() += c;
    }
  }
  return lines;
}

class Drawing {
 public:
  void rectangle(double x, double y, double width, double height, const std::string& fill) {
    body_ += concat("<rect x=\"", number(x), "\" y=\"", number(y), "\" width=\"", number(width),
                    "\" height=\"", number(height), "\" fill=\"", fill, "\"/>\n");
  }
  void line(double x1, double y1, double x2, double y2, const std::string& stroke,
            const std::string& dashes = "") {
    body_ += concat("<line x1=\"", number(x1), "\" y1=\"", number(y1), "\" x2=\"", number(x2),
                    "\" y2=\"", number(y2), "\" stroke=\"", stroke, "\"",
                    dashes.empty() ? "" : " stroke-dasharray=\"" + dashes + "\"", "/>\n");
  }
  struct Style {
    double size = 12;
    const char* anchor = "start";
    const char* fill = kInk;
    bool bold = false;
    double turn = 0;    // degrees
    bool halo = false;  // white around the letters, for what stands on lines
  };
  void text(double x, double y, const std::string& content, const Style& style) {
    const std::string turn = style.turn == 0 ? ""
                                             : concat(" transform=\"rotate(", number(style.turn),
                                                      " ", number(x), " ", number(y), ")\"");
    const std::string element = concat(
        "<text x=\"", number(x), "\" y=\"", number(y), "\" font-size=\"", number(style.size),
        "\" text-anchor=\"", style.anchor, "\"", style.bold ? " font-weight=\"600\"" : "", turn);
    const std::string letters = ">" + escaped(content) + "</text>\n";
    // Written twice, since not every viewer knows how to paint a stroke under its text.
    if (style.halo)
      body_ += element + " fill=\"#ffffff\" stroke=\"#ffffff\" stroke-width=\"3\"" + letters;
    body_ += element + " fill=\"" + style.fill + "\"" + letters;
  }
  /// Title and subtitle at the top, then the legend in as many lines as the width asks for; returns
  /// where the plot may begin.
  double head(const std::string& title, const std::string& subtitle,
              const std::vector<std::string>& legend, double width) {
    text(kMargin, 30, title, {.size = 17, .bold = true});
    text(kMargin, 50, subtitle, {.fill = kFaintInk});
    double x = kMargin, y = 74;
    for (size_t i = 0; i < legend.size(); ++i) {
      const double needed = 34 + width_of(legend[i], 12);
      if (x > kMargin && x + needed > width - kMargin) {
        x = kMargin;
        y += 20;
      }
      rectangle(x, y - 10, 12, 12, color(i));
      text(x + 18, y, legend[i], {});
      x += needed;
    }
    return y + 24;
  }
  std::string finish(double width, double height) const {
    return concat("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ", number(width), " ",
                  number(height), "\" width=\"", number(width), "\" height=\"", number(height),
                  "\" font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, "
                  "sans-serif\">\n<rect width=\"100%\" height=\"100%\" rx=\"6\" "
                  "fill=\"#ffffff\"/>\n",
                  body_, "</svg>\n");
  }

  static constexpr double kMargin = 24;

 private:
  static std::string number(double value) {
    std::string text = fixed(value, 1);
    if (text.ends_with(".0")) text.resize(text.size() - 2);
    return text;
  }

  std::string body_;
};

// The distance of ticks, 1, 2 or 5 times a power of ten, for about six of them.
double tick_step(double largest) {
  const double rough = largest / 6;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (rough <= factor * power) return factor * power;
  return 10 * power;
}

std::string tick_label(double value, double step) {
  return fixed(value, std::max(0, static_cast<int>(-std::floor(std::log10(step) + 1e-9))));
}

// For widths: the heading must fit.
double head_width(const std::string& title, const std::string& subtitle) {
  return 2 * Drawing::kMargin + std::max(width_of(title, 17), width_of(subtitle, 12) * 0.92);
}

}  // namespace

std::string to_svg(const LineChart& chart) {
  constexpr double kLeft = 88, kWidth = 560, kPlot = 300;
  double least = 0, most = 1, largest = 0;
  bool any = false;
  for (const auto& series : chart.series) {
    for (const auto& [x, y] : series.points) {
      least = any ? std::min(least, x) : x;
      most = any ? std::max(most, x) : x;
      any = true;
      largest = std::max(largest, y);
    }
  }
  double margin = Drawing::kMargin;
  for (const Reference& reference : chart.references) {
    largest = std::max(largest, reference.value);
    margin = std::max(margin, 14 + width_of(reference.label, 11.5));
  }
  if (largest <= 0) largest = 1;
  if (most <= least) most = least + 1;
  const double step = tick_step(largest), x_step = tick_step(most - least);
  const double top_value = largest * 1.05;
  const double width = std::max(kLeft + kWidth + margin, head_width(chart.title, chart.subtitle));

  std::vector<std::string> legend;
  for (const auto& series : chart.series) legend.push_back(series.name);
  Drawing drawing;
  const double top = drawing.head(chart.title, chart.subtitle, legend, width);
  const double bottom = top + kPlot, right = kLeft + kWidth;
  const auto x_of = [&](double x) { return kLeft + kWidth * (x - least) / (most - least); };
  const auto y_of = [&](double y) { return bottom - kPlot * y / top_value; };
  for (int i = 0; i * step <= top_value; ++i) {
    drawing.line(kLeft, y_of(i * step), right, y_of(i * step), i == 0 ? kFaintInk : kGrid);
    drawing.text(kLeft - 8, y_of(i * step) + 4, tick_label(i * step, step),
                 {.size = 11, .anchor = "end", .fill = kFaintInk});
  }
  for (double x = std::ceil(least / x_step - 1e-9) * x_step; x <= most + 1e-9; x += x_step)
    drawing.text(x_of(x), bottom + 18, tick_label(x, x_step),
                 {.size = 11, .anchor = "middle", .fill = kFaintInk});
  drawing.text(18, top + kPlot / 2, chart.unit,
               {.anchor = "middle", .fill = kFaintInk, .turn = -90});
  drawing.text(kLeft + kWidth / 2, bottom + 38, chart.x_unit,
               {.anchor = "middle", .fill = kFaintInk});
  for (const Reference& reference : chart.references) {
    const double y = y_of(reference.value);
    drawing.line(kLeft, y, right, y, kInk, "5 4");
    drawing.text(right + 6, y + 4, reference.label, {.size = 11, .bold = true});
  }
  for (size_t s = 0; s < chart.series.size(); ++s) {
    const auto& points = chart.series[s].points;
    for (size_t i = 0; i < points.size(); ++i) {
      const double x = x_of(points[i].first), y = y_of(points[i].second);
      if (i > 0)
        drawing.line(x_of(points[i - 1].first), y_of(points[i - 1].second), x, y, color(s));
      drawing.rectangle(x - 2.5, y - 2.5, 5, 5, color(s));
    }
  }
  return drawing.finish(width, bottom + 54);
}

std::string to_svg(const GroupedBars& chart) {
  constexpr double kBar = 20, kGap = 28, kLeft = 72, kPlot = 300, kLineHeight = 15;
  double group_width = kGap + kBar * static_cast<double>(chart.series.size());
  size_t label_lines = 1;
  for (const std::string& group : chart.groups) {
    const std::vector<std::string> lines = lines_of(group);
    label_lines = std::max(label_lines, lines.size());
    for (const std::string& line : lines)
      group_width = std::max(group_width, width_of(line, 11.5) + 14);
  }
  const double plot_width = group_width * static_cast<double>(chart.groups.size());
  double margin = Drawing::kMargin;
  for (const Reference& reference : chart.references)
    margin = std::max(margin, 14 + width_of(reference.label, 11.5));
  const double width =
      std::max({kLeft + plot_width + margin, 520.0, head_width(chart.title, chart.subtitle)});

  double largest = 0;
  for (const auto& series : chart.series)
    for (const auto& value : series.values) largest = std::max(largest, value.value_or(0));
  for (const Reference& reference : chart.references) largest = std::max(largest, reference.value);
  if (largest <= 0) largest = 1;
  const int digits = largest < 10 ? 2 : largest < 100 ? 1 : 0;
  const double step = tick_step(largest);
  const double top_value = largest * 1.14;  // room for the bars' labels

  std::vector<std::string> legend;
  for (const auto& series : chart.series) legend.push_back(series.name);
  Drawing drawing;
  const double top = drawing.head(chart.title, chart.subtitle, legend, width);
  const double bottom = top + kPlot;
  const double right = kLeft + plot_width;
  const auto y_of = [&](double value) { return bottom - kPlot * value / top_value; };

  for (int i = 0; i * step <= top_value; ++i) {
    const double y = y_of(i * step);
    drawing.line(kLeft, y, right, y, i == 0 ? kFaintInk : kGrid);
    drawing.text(kLeft - 8, y + 4, tick_label(i * step, step),
                 {.size = 11, .anchor = "end", .fill = kFaintInk});
  }
  drawing.text(18, top + kPlot / 2, chart.unit,
               {.anchor = "middle", .fill = kFaintInk, .turn = -90});

  const auto each_bar = [&](const auto& draw) {
    for (size_t g = 0; g < chart.groups.size(); ++g) {
      double x = kLeft + group_width * (static_cast<double>(g) + 0.5) -
                 kBar * static_cast<double>(chart.series.size()) / 2;
      for (size_t s = 0; s < chart.series.size(); ++s, x += kBar)
        if (const std::optional<double> value = chart.series[s].values[g]) draw(s, g, x, *value);
    }
  };
  // Where the whisker of a bar ends, or the bar itself.
  const auto top_of = [&](size_t s, size_t g, double value) {
    const auto& spreads = chart.series[s].spreads;
    return spreads.empty() ? value : std::max(value, spreads[g].second);
  };
  each_bar([&](size_t s, size_t g, double x, double value) {
    drawing.rectangle(x + 1, y_of(value), kBar - 2, bottom - y_of(value), color(s));
    if (chart.series[s].spreads.empty()) return;
    const double low = y_of(chart.series[s].spreads[g].first), high = y_of(top_of(s, g, value));
    const double center = x + kBar / 2;
    drawing.line(center, low, center, high, kInk);
    for (const double end : {low, high}) drawing.line(center - 4, end, center + 4, end, kInk);
  });
  for (const Reference& reference : chart.references) {
    const double y = y_of(reference.value);
    drawing.line(kLeft, y, right, y, kInk, "5 4");
    drawing.text(right + 6, y + 4, reference.label, {.size = 11, .bold = true});
  }
  each_bar([&](size_t s, size_t g, double x, double value) {
    drawing.text(x + kBar / 2 + 4, y_of(top_of(s, g, value)) - 5, fixed(value, digits),
                 {.size = 10.5, .bold = s == 0, .turn = -90, .halo = true});
  });
  for (size_t g = 0; g < chart.groups.size(); ++g) {
    const double center = kLeft + group_width * (static_cast<double>(g) + 0.5);
    const std::vector<std::string> lines = lines_of(chart.groups[g]);
    for (size_t i = 0; i < lines.size(); ++i)
      drawing.text(center, bottom + 18 + kLineHeight * static_cast<double>(i), lines[i],
                   {.size = 11.5, .anchor = "middle", .fill = i == 0 ? kInk : kFaintInk});
  }
  return drawing.finish(width, bottom + 20 + kLineHeight * static_cast<double>(label_lines));
}

std::string to_svg(const StackedBars& chart) {
  constexpr double kBar = 20, kPlot = 560, kHeading = 24, kGroupGap = 12;
  double names = 0, labels = 0, largest = chart.reference ? chart.reference->value : 0;
  for (const auto& group : chart.groups) {
    for (const auto& bar : group.bars) {
      names = std::max(names, width_of(bar.name, 12));
      labels = std::max(labels, width_of(bar.label, 11));
      double sum = 0;
      for (const double part : bar.parts) sum += part;
      largest = std::max(largest, sum);
    }
  }
  if (largest <= 0) largest = 1;
  const double left = Drawing::kMargin + names + 12;
  const double width = std::max(left + kPlot + 10 + labels + Drawing::kMargin,
                                head_width(chart.title, chart.subtitle));
  const double step = tick_step(largest);
  const auto x_of = [&](double value) { return left + kPlot * value / largest; };

  Drawing drawing;
  const double top = drawing.head(chart.title, chart.subtitle, chart.parts, width) + 8;
  double bottom = top;
  for (const auto& group : chart.groups)
    bottom += kHeading + kGroupGap + kBar * static_cast<double>(group.bars.size());
  for (int i = 0; i * step <= largest * 1.0001; ++i) {
    drawing.line(x_of(i * step), top, x_of(i * step), bottom, i == 0 ? kFaintInk : kGrid);
    drawing.text(x_of(i * step), bottom + 16, tick_label(i * step, step),
                 {.size = 11, .anchor = "middle", .fill = kFaintInk});
  }
  drawing.text(left + kPlot / 2, bottom + 36, chart.unit, {.anchor = "middle", .fill = kFaintInk});
  if (chart.reference) {
    const double x = x_of(chart.reference->value);
    drawing.line(x, top - 4, x, bottom, kInk, "5 4");
    drawing.text(x, top - 8, chart.reference->label,
                 {.size = 11, .anchor = "middle", .bold = true});
  }
  double y = top;
  for (const auto& group : chart.groups) {
    drawing.text(Drawing::kMargin, y + 17, group.name, {.bold = true});
    y += kHeading;
    for (const auto& bar : group.bars) {
      drawing.text(left - 8, y + 14, bar.name, {.anchor = "end"});
      double sum = 0;
      for (size_t p = 0; p < bar.parts.size(); ++p) {
        if (bar.parts[p] <= 0) continue;
        drawing.rectangle(x_of(sum), y + 2, x_of(bar.parts[p]) - left, kBar - 4, color(p));
        sum += bar.parts[p];
      }
      drawing.text(x_of(sum) + 8, y + 14, bar.label, {.size = 11, .fill = kFaintInk, .halo = true});
      y += kBar;
    }
    y += kGroupGap;
  }
  return drawing.finish(width, bottom + 52);
}

}  // namespace vernier::cli
