"use strict";
(() => {
  const one = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const items = read("items"), shown = read("shown");
  const numbers = new Intl.NumberFormat("en");
  const charts = []; // of Bokeh: a layout, whose tags are its linear plot and its logarithmic one
  const plots = [];

  // ---- Curves

  const measure = () => one("#measure input:checked")?.value ?? "step";
  const hidden = () => all('.legend [aria-pressed="false"]').map((button) => +button.dataset.run);

  function byMeasure() {
    const name = measure(), sources = new Set();
    for (const plot of plots) {
      for (const renderer of plot.renderers) sources.add(renderer.data_source);
      plot.below[0].axis_label = name;
    }
    for (const source of sources) source.data = { ...source.data, x: source.data[name] };
    for (const plot of plots) plot.reset.emit();
  }

  function byScale() {
    const log = one("#log")?.checked ?? false;
    for (const chart of charts) chart.children = [chart.tags[log ? chart.tags.length - 1 : 0]];
  }

  function byRun() {
    const gone = hidden();
    for (const plot of plots) {
      for (const renderer of plot.renderers) {
        renderer.visible = !gone.includes(renderer.data_source.tags[0]);
      }
    }
    for (const part of all("#previews [data-run]")) part.hidden = gone.includes(+part.dataset.run);
  }

  function paint() {
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, rule] = ["--ink", "--soft", "--rule"].map((n) => style.getPropertyValue(n).trim());
    for (const plot of plots) {
      plot.outline_line_color = rule;
      for (const axis of [...plot.below, ...plot.left]) {
        Object.assign(axis, {
          axis_label_text_color: soft, axis_label_text_font_style: "normal",
          major_label_text_color: ink, axis_line_color: rule, major_tick_line_color: rule,
          minor_tick_line_color: null,
        });
      }
      for (const grid of plot.center) grid.grid_line_color = rule;
    }
  }

  async function embed() {
    for (const [key, item] of Object.entries(items)) {
      await Bokeh.embed.embed_item(item, `chart-${key}`);
      charts.push(...Bokeh.documents.at(-1).roots());
    }
    plots.push(...charts.flatMap((chart) => chart.tags));
    if (matchMedia("(pointer: coarse)").matches) {
      for (const plot of plots) plot.toolbar.active_drag = null; // a finger scrolls
    }
    paint();
    byRun();
    byScale();
    if (measure() !== "step") byMeasure();
    document.documentElement.dataset.drawn = "";
  }

  // ---- Previews

  const number = (title) => parseInt(title, 10) || 0;

  function nearest(columns, wanted) {
    const apart = columns.map((title) => Math.abs(number(title) - number(wanted)));
    return columns.includes(wanted) ? columns.indexOf(wanted) : apart.indexOf(Math.min(...apart));
  }

  function show(picture, uri) {
    picture.hidden = !uri;
    if (uri && picture.src !== uri) picture.src = uri;
  }

  function previews() {
    const slider = one("#step");
    if (!slider) return;
    const step = shown.steps[+slider.value];
    const wanted = one("#column input:checked")?.value ?? "";
    one("#step-shown").textContent = numbers.format(step);
    for (const part of all("#previews [data-run]")) {
      const sheet = shown.runs[+part.dataset.run].filter((each) => each.step <= step).pop();
      const column = sheet ? nearest(sheet.columns, wanted) : -1;
      const how = column < 0 ? "" : `, ${sheet.columns[column]}`;
      one(".at", part).textContent = sheet ? `step ${numbers.format(sheet.step)}${how}` : "none yet";
      if (part.classList.contains("whole")) {
        show(one("img", part), sheet?.pictures[0]?.[0]);
        continue;
      }
      for (const picture of all("img", part)) {
        const row = sheet ? sheet.prompts.indexOf(shown.prompts[+picture.dataset.row]) : -1;
        show(picture, sheet?.pictures[column]?.[row]);
      }
    }
  }

  // ---- A page that is kept up to date loads itself again, and stays where the reader was

  const KEY = "distillery-compare";
  const STATE = "#measure input, #column input, #log, #step";

  function keep() {
    const inputs = all(STATE).map((input) => [input.name || input.id, input.value, input.checked]);
    const last = one("#step") && one("#step").value === one("#step").max;
    const open = all("details").map((each) => each.open);
    const across = all(".scroll").map((each) => each.scrollLeft);
    const state = { inputs, last, open, across, hidden: hidden(), top: scrollY };
    try {
      sessionStorage.setItem(KEY, JSON.stringify(state));
    } catch {} // not for pages in a sandbox
  }

  function restore() {
    let state = null;
    try {
      state = JSON.parse(sessionStorage.getItem(KEY));
    } catch {}
    if (!state) return;
    const before = new Map(state.inputs.map(([name, value, checked]) => [`${name} ${value}`, checked]));
    for (const input of all(STATE)) {
      if (input.type === "range") {
        const found = state.inputs.find(([name]) => name === input.id);
        if (found && !state.last) input.value = found[1];
      } else if (before.has(`${input.name || input.id} ${input.value}`)) {
        input.checked = before.get(`${input.name || input.id} ${input.value}`);
      }
    }
    for (const button of all(".legend button")) {
      button.ariaPressed = `${!state.hidden.includes(+button.dataset.run)}`;
    }
    all("details").forEach((each, place) => { each.open = state.open[place] ?? false; });
    all(".scroll").forEach((each, place) => { each.scrollLeft = state.across[place] ?? 0; });
    history.scrollRestoration = "manual";
    scrollTo(0, state.top);
  }

  function reload(seconds) {
    let used = 0;
    for (const kind of ["pointerdown", "pointermove", "keydown", "wheel", "touchmove"]) {
      addEventListener(kind, () => { used = Date.now(); }, { passive: true });
    }
    const wait = () => {
      if (document.hidden || Date.now() - used < 3000) return void setTimeout(wait, 1000);
      keep();
      location.reload();
    };
    setTimeout(wait, 1000 * seconds);
  }

  // ---- What happens when

  one("#measure")?.addEventListener("change", byMeasure);
  one("#log")?.addEventListener("change", byScale);
  one("#step")?.addEventListener("input", previews);
  one("#column")?.addEventListener("change", previews);
  for (const button of all(".legend button")) {
    button.addEventListener("click", () => {
      button.ariaPressed = `${button.ariaPressed !== "true"}`;
      byRun();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  const seconds = +(one('meta[name="refresh"]')?.content ?? 0);
  if (seconds) restore();
  previews();
  if (seconds) reload(seconds);
  if (window.Bokeh) embed();
})();
