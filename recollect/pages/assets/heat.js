// Heat maps: one pixel per cell, scaled up by CSS; pointer or arrow keys read a cell. Maps of attention, and learned kernels.

// spec: rows, cols, values (row by row; NaN or null is blank), share(value, row) in [-1, 1], kind, label, describe(row, col);
// optional: moved(row) when another cell is read, picked(row) on a click or Enter.
function heatMap(spec) {
  const canvas = node("canvas", { width: spec.cols, height: spec.rows, tabindex: 0, role: "img", "aria-label": spec.label });
  const cursor = node("div", { class: "cursor", hidden: "" });
  const field = node("div", { class: "field" }, canvas, cursor);
  let [row, col] = [spec.rows - 1, 0];

  function paint() {
    const context = canvas.getContext("2d"), image = context.createImageData(spec.cols, spec.rows), color = ramp(spec.kind);
    for (let i = 0; i < spec.rows * spec.cols; i++) {
      const value = spec.values[i];
      if (value === null || Number.isNaN(value)) continue;
      const [r, g, b] = color(spec.share(value, Math.floor(i / spec.cols))), at = 4 * i;
      image.data[at] = r; image.data[at + 1] = g; image.data[at + 2] = b; image.data[at + 3] = 255;
    }
    context.putImageData(image, 0, 0);
  }

  function read(x, y) {
    toRow(cursor, row, spec.rows);
    Object.assign(cursor.style, { left: `${(100 * col) / spec.cols}%`, width: `${100 / spec.cols}%` });
    cursor.hidden = false;
    showTip(spec.describe(row, col), x, y);
    spec.moved?.(row);
  }

  const clear = () => { cursor.hidden = true; hideTip(); };
  canvas.addEventListener("pointermove", (event) => {
    const frame = canvas.getBoundingClientRect();
    row = Math.max(0, Math.min(spec.rows - 1, Math.floor(((event.clientY - frame.top) / frame.height) * spec.rows)));
    col = Math.max(0, Math.min(spec.cols - 1, Math.floor(((event.clientX - frame.left) / frame.width) * spec.cols)));
    read(event.clientX, event.clientY);
  });
  canvas.addEventListener("pointerleave", clear);
  canvas.addEventListener("blur", clear);
  canvas.addEventListener("click", () => spec.picked?.(row));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") clear();
    if (event.key === "Enter") spec.picked?.(row);
    if (!move) return;
    event.preventDefault();
    row = Math.max(0, Math.min(spec.rows - 1, row + move[0]));
    col = Math.max(0, Math.min(spec.cols - 1, col + move[1]));
    const frame = canvas.getBoundingClientRect();
    read(frame.left + ((col + 0.5) / spec.cols) * frame.width, frame.top + ((row + 0.5) / spec.rows) * frame.height);
  });
  theme.addEventListener("change", () => { if (canvas.isConnected) paint(); });
  paint();
  return field;
}

// Move a mark in the field of a heat map to one of its rows.
function toRow(mark, row, rows) {
  Object.assign(mark.style, { top: `${(100 * row) / rows}%`, height: `${100 / rows}%` });
}

// One tick per row or column; `kind` "ends": as far apart as there is room.
function ticks(axis, texts, kind = "") {
  return node("div", { class: `ticks ${axis} ${kind}`.trim(), "aria-hidden": "true" }, ...texts.map((text) => node("span", {}, text)));
}

// A heat map with its title, what stands across from that, its ticks and the names of its axes.
function heatFigure(title, across, field, yTicks, xTicks, axes) {
  return node("figure", {}, node("figcaption", {}, node("strong", {}, title), across),
    node("div", { class: "heat" }, yTicks, field, node("span"), xTicks, node("div", { class: "name" }, axes)));
}

// --- maps of attention --------------------------------------------------------------------------------------------------------

// One head of packed lower triangles as the whole square [side * side]; keys after the query are blank.
function square(item, side, head) {
  const flat = ofHead(item, (side * (side + 1)) / 2, head), values = new Float32Array(side * side).fill(NaN);
  let at = 0;
  for (let row = 0; row < side; row++) for (let col = 0; col <= row; col++) values[row * side + col] = flat[at++];
  return values;
}

// A map over `length` tokens; `range`: the legend.
function mapFigure(title, range, field, length) {
  const edge = [0, Math.floor((length - 1) / 2), length - 1].map((i) => i.toLocaleString("en"));
  return heatFigure(title, range, field, ticks("y", edge, "ends"), ticks("x", edge, "ends"), "key position \u2192, query position \u2193");
}

// --- kernels ------------------------------------------------------------------------------------------------------------------

const KERNEL_NAMES = {
  kq_pre: "Key-query kernels before the softmax", kq_post: "Key-query kernels after the softmax",
  head_pre: "Head mixing before the softmax", head_post: "Head mixing after the softmax",
};

// kernel: kind, rows, cols, values (row by row), origin (the same key's column), first (the number of head 0 of a head matrix).
// title: above the picture; whose: the same for those who do not see where it stands.
function kernelFigure(kernel, title, whose) {
  const heads = kernel.kind.startsWith("head"), scale = largest(kernel.values) || 1;
  const back = (row) => kernel.rows - 1 - row;
  const where = (row, col) => (heads
    ? `from head ${kernel.first + col} to head ${kernel.first + row}`
    : `${back(row) ? `${back(row)} ${back(row) > 1 ? "queries" : "query"} back` : "this query"}, ${col === kernel.origin ? "same key" : `key ${signed(col - kernel.origin)}`}`);
  const field = heatMap({
    rows: kernel.rows, cols: kernel.cols, values: kernel.values, kind: "diverging", share: (value) => value / scale,
    label: `${KERNEL_NAMES[kernel.kind] ?? kernel.kind}, ${whose}; arrow keys read values`,
    describe: (row, col) => `${numberText(kernel.values[row * kernel.cols + col])}\n${where(row, col)}`,
  });
  const keep = (col) => kernel.cols <= 11 || col === kernel.origin || col === 0 || col === kernel.cols - 1;
  const rowTexts = Array.from({ length: kernel.rows }, (_, row) => (heads ? String(kernel.first + row) : signed(-back(row))));
  const colTexts = Array.from({ length: kernel.cols }, (_, col) => (!keep(col) ? "" : heads ? String(kernel.first + col) : signed(col - kernel.origin)));
  const figure = heatFigure(title, `\u00b1${numberText(scale)}`, field, ticks("y", rowTexts), ticks("x", colTexts),
    heads ? "from \u2192, to \u2193" : "key offset \u2192, query \u2193");
  const cell = Math.max(12, Math.min(kernel.cols < 5 ? 32 : 24, 260 / kernel.cols));
  figure.querySelector(".heat").style.gridTemplateColumns = `auto minmax(0, ${cell * kernel.cols}px)`;
  field.style.aspectRatio = `${kernel.cols} / ${kernel.rows}`;
  return figure;
}

// A heading per kind, the figures of its kernels and what `below` says of them.
function kernelGroups(kernels, figure, below = () => []) {
  return [...new Set(kernels.map((kernel) => kernel.kind))].flatMap((kind) => {
    const some = kernels.filter((kernel) => kernel.kind === kind);
    return [node("h3", {}, KERNEL_NAMES[kind] ?? kind), node("div", { class: "kernel-row" }, ...some.map(figure)), ...below(some)];
  });
}
