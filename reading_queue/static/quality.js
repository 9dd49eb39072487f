// The chart: medians of the segments that follow each other, stacked, a bar for each group.
const box = document.getElementById("chart");
if (box) {
  const data = JSON.parse(JSON.parse(document.getElementById("chart-data").textContent));
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  // One hue by depth: colours that mean red, amber, green stay free for what they mean.
  const shades = ["#cfdbe8", "#a9bfd6", "#7fa0c2", "#0b3a63", "#0f6a95", "#3d97b8", "#7bbdd0", "#b5dbe3"];
  box.style.height = `${110 + 46 * data.parts.length}px`;
  const chart = window.echarts.init(box, null, { renderer: "svg" });
  chart.setOption({
    animation: false,
    textStyle: { fontFamily: style.getPropertyValue("--font"), color: colour("--text") },
    color: shades,
    legend: { top: 0, left: 8, itemWidth: 12, itemHeight: 12, textStyle: { color: colour("--text") } },
    grid: { left: 150, right: 60, top: 40, bottom: 30 },
    tooltip: { trigger: "axis", axisPointer: { type: "shadow" }, renderMode: "richText", valueFormatter: (value) => `${value} ${data.unit}` },
    xAxis: { type: "value", name: data.unit, nameTextStyle: { color: colour("--quiet") }, axisLabel: { color: colour("--quiet") }, splitLine: { lineStyle: { color: colour("--line") } } },
    yAxis: { type: "category", inverse: true, data: data.parts, axisLabel: { color: colour("--text"), width: 135, overflow: "break" } },
    series: data.series.map((one) => ({ ...one, type: "bar", stack: "all", barWidth: 22 })),
  });
  window.addEventListener("resize", () => chart.resize());
}
