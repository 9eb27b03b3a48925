// The kernels and head-mixing matrices of the chosen layer, each with its pattern.
const KERNEL_NAMES = {
  kq_pre: "Key-query kernels before the softmax", kq_post: "Key-query kernels after the softmax",
  head_pre: "Head mixing before the softmax", head_post: "Head mixing after the softmax",
};

function kernelFigure(kernel) {
  const heads = kernel.kind.startsWith("head");
  const scale = Math.max(...kernel.values.map((value) => Math.abs(value ?? 0))) || 1;
  const back = (row) => kernel.rows - 1 - row;
  const where = (row, col) => (heads
    ? `from head ${kernel.first + col} to head ${kernel.first + row}`
    : `${back(row) ? `${back(row)} ${back(row) > 1 ? "queries" : "query"} back` : "this query"}, ${col === kernel.origin ? "same key" : `key ${signed(col - kernel.origin)}`}`);
  const field = heatMap({
    rows: kernel.rows, cols: kernel.cols, values: kernel.values, kind: "diverging", share: (value) => value / scale,
    label: `${KERNEL_NAMES[kernel.kind]}, ${kernel.title}, pattern ${kernel.pattern}; arrow keys read values`,
    describe: (row, col) => `${numberText(kernel.values[row * kernel.cols + col])}\n${where(row, col)}`,
  });
  const ticks = (axis, texts) => node("div", { class: `ticks ${axis}`, "aria-hidden": "true" }, ...texts.map((text) => node("span", {}, text)));
  const few = kernel.cols <= 11;
  const rowTexts = Array.from({ length: kernel.rows }, (_, row) => (heads ? String(kernel.first + row) : signed(-back(row))));
  const colTexts = Array.from({ length: kernel.cols }, (_, col) => {
    const keep = few || col === kernel.origin || col === 0 || col === kernel.cols - 1;
    return keep ? (heads ? String(kernel.first + col) : signed(col - kernel.origin)) : "";
  });
  const heat = node("div", { class: "heat" }, ticks("y", rowTexts), field, node("span"), ticks("x", colTexts),
    node("div", { class: "name" }, heads ? "from \u2192, to \u2193" : "key offset \u2192, query \u2193"));
  const cell = Math.max(12, Math.min(kernel.cols < 5 ? 32 : 24, 260 / kernel.cols));
  heat.style.gridTemplateColumns = `auto minmax(0, ${cell * kernel.cols}px)`;
  field.style.aspectRatio = `${kernel.cols} / ${kernel.rows}`;
  const name = node("p", { class: "pattern" }, node("b", {}, kernel.pattern), kernel.share ? `, ${kernel.share}` : "");
  return node("figure", {}, node("figcaption", {}, node("strong", {}, kernel.title), `\u00b1${numberText(scale)}`), heat, name);
}

function renderKernels() {
  const grid = get("kernel-grid"), all = layer().kernels;
  get("kernels").hidden = !all.length;
  grid.replaceChildren();
  for (const kind of new Set(all.map((kernel) => kernel.kind))) {
    const some = all.filter((kernel) => kernel.kind === kind);
    const names = [...new Set(some.map((kernel) => kernel.pattern))].filter((name) => DATA.patterns[name]);
    grid.append(
      node("h3", {}, KERNEL_NAMES[kind] ?? kind),
      node("div", { class: "kernel-row" }, ...some.map(kernelFigure)),
      node("ul", { class: "notes" }, ...names.map((name) => node("li", {}, node("b", {}, name), `: ${DATA.patterns[name]}`))),
    );
  }
}
