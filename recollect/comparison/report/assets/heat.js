// Heat maps: one pixel per cell, scaled up by CSS; pointer or arrow keys read a cell. And the section of learned kernels.

// spec: rows, cols, values (row by row; NaN or null is blank), scale, kind, label, describe(row, col), picked(row, col) optional.
function heatMap(spec) {
  const canvas = node("canvas", { width: spec.cols, height: spec.rows, tabindex: 0, role: "img", "aria-label": spec.label });
  const cursor = node("div", { class: "cursor", hidden: "" });
  const field = node("div", { class: "field" }, canvas, cursor);
  let [row, col] = [spec.rows - 1, 0];

  function paint() {
    const context = canvas.getContext("2d");
    const image = context.createImageData(spec.cols, spec.rows);
    const color = ramp(spec.kind);
    for (let i = 0; i < spec.rows * spec.cols; i++) {
      const value = spec.values[i];
      if (value === null || Number.isNaN(value)) continue;
      const [r, g, b] = color(value / (spec.scale || 1));
      image.data.set([r, g, b, 255], 4 * i);
    }
    context.putImageData(image, 0, 0);
  }

  function read(x, y) {
    Object.assign(cursor.style, {
      left: `${(100 * col) / spec.cols}%`, top: `${(100 * row) / spec.rows}%`, width: `${100 / spec.cols}%`, height: `${100 / spec.rows}%`,
    });
    cursor.hidden = false;
    showTip(spec.describe(row, col), x, y);
    if (spec.picked) spec.picked(row, col);
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
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") clear();
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

const signed = (n) => (n > 0 ? `+${n}` : n < 0 ? `\u2212${-n}` : "0");

// One tick per row or column; long axes keep only those that `keep` wants.
function ticks(axis, texts, keep = () => true) {
  return node("div", { class: `ticks ${axis}`, "aria-hidden": "true" }, ...texts.map((text, i) => node("span", {}, keep(i) ? text : "")));
}

const KERNEL_NAMES = {
  kq_pre: "Key-query kernels before the softmax", kq_post: "Key-query kernels after the softmax",
  head_pre: "Head mixing before the softmax", head_post: "Head mixing after the softmax",
};

function kernelFigure(kernel, owner) {
  const heads = kernel.name.startsWith("head");
  const scale = Math.max(...kernel.values.map((value) => Math.abs(value ?? 0))) || 1;
  const name = `layer ${kernel.layer}, ${kernel.title}`;
  const back = (row) => kernel.rows - 1 - row;
  const where = (row, col) => (heads
    ? `from head ${kernel.first + col} to head ${kernel.first + row}`
    : `${back(row) ? `${back(row)} ${back(row) > 1 ? "queries" : "query"} back` : "this query"}, ${col === kernel.origin ? "same key" : `key ${signed(col - kernel.origin)}`}`);
  const field = heatMap({
    rows: kernel.rows, cols: kernel.cols, values: kernel.values, scale, kind: "diverging",
    label: `${KERNEL_NAMES[kernel.name] ?? kernel.name}, ${owner}, ${name}; arrow keys read values`,
    describe: (row, col) => `${numberText(kernel.values[row * kernel.cols + col])}\n${where(row, col)}`,
  });
  const cell = Math.max(12, Math.min(kernel.cols < 5 ? 32 : 24, 260 / kernel.cols));
  const rowTexts = Array.from({ length: kernel.rows }, (_, row) => (heads ? String(kernel.first + row) : signed(-back(row))));
  const colTexts = Array.from({ length: kernel.cols }, (_, col) => (heads ? String(kernel.first + col) : signed(col - kernel.origin)));
  const few = kernel.cols <= 11;
  const keep = (col) => few || col === kernel.origin || col === 0 || col === kernel.cols - 1;
  const heat = node("div", { class: "heat" }, ticks("y", rowTexts), field, node("span"), ticks("x", colTexts, keep),
    node("div", { class: "name" }, heads ? "from \u2192, to \u2193" : "key offset \u2192, query \u2193"));
  heat.style.gridTemplateColumns = `auto minmax(0, ${cell * kernel.cols}px)`;
  field.style.aspectRatio = `${kernel.cols} / ${kernel.rows}`;
  return node("figure", {}, node("figcaption", {}, node("strong", {}, name), `\u00b1${numberText(scale)}`), heat);
}

// What to show first: the run with the most learned kernels.
const richest = (items) => items.reduce((a, b) => (b.kernels.length > a.kernels.length ? b : a));

function drawKernels(section) {
  const found = DATA.inspections.filter((item) => item.kernels.length);
  if (!found.length) return;
  section.hidden = false;
  const controls = document.getElementById("kernel-controls"), grid = document.getElementById("kernel-grid");
  let item = richest(found), layer = "";

  function render() {
    const layers = [...new Set(item.kernels.map((kernel) => kernel.layer))];
    if (layer === "" || (layer !== "all" && !layers.includes(Number(layer)))) layer = item.kernels.length > 32 ? String(layers[0]) : "all";
    controls.replaceChildren(
      select("mixer", found.map((other) => [other.label, `${other.label} (seed ${other.seed})`]), item.label, (value) => {
        item = found.find((other) => other.label === value);
        render();
      }),
      select("layer", [["all", "all"], ...layers.map((one) => [one, one])], layer, (value) => { layer = value; render(); }),
      node("span", { class: "scale" }, "negative", node("i", { style: "background:linear-gradient(90deg,var(--low),var(--zero),var(--high))" }), "positive; each picture on its own scale"),
    );
    grid.replaceChildren();
    for (const name of new Set(item.kernels.map((kernel) => kernel.name))) {
      const some = item.kernels.filter((kernel) => kernel.name === name && (layer === "all" || kernel.layer === Number(layer)));
      if (some.length) grid.append(node("h3", {}, KERNEL_NAMES[name] ?? name), node("div", { class: "kernel-row" }, ...some.map((kernel) => kernelFigure(kernel, item.label))));
    }
  }
  render();
}

drawKernels(document.getElementById("kernels"));
