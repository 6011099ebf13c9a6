// Measures a page as it is laid out: widths, sizes of texts, contrasts, and what is folded.
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [high, low] = [light(a), light(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const shown = (element) => element.checkVisibility({ contentVisibilityAuto: true }) && element.getClientRects().length;
  const own = (element) => [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const texts = [...document.querySelectorAll("main *")].filter((e) => own(e) && shown(e) && !e.closest("desc, title"));
  const pale = [];
  for (const e of texts) {
    const style = getComputedStyle(e);
    const ratio = contrast(rgba(e.closest("svg") ? style.fill : style.color), ground(e));
    if (ratio < 4.5) pale.push(`${e.tagName} ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  for (const e of document.querySelectorAll(".stroke:not(.track), .spot")) {
    const style = getComputedStyle(e);
    const ratio = contrast(rgba(e.matches(".spot") ? style.fill : style.stroke), ground(e));
    if (ratio < 3) pale.push(`${e.getAttribute("class")} ${ratio.toFixed(2)}`);
  }
  const sizes = texts.map((e) => parseFloat(getComputedStyle(e).fontSize) * (e.getScreenCTM ? e.getScreenCTM().a : 1));
  const folded = [...document.querySelectorAll("details.printed")];
  const configuration = document.querySelector("details.configuration");
  return {
    wide: document.scrollingElement.scrollWidth,
    texts: texts.length,
    smallest: Math.min(...sizes),
    pale: [...new Set(pale)],
    dark: light(ground(document.body)) < 0.5,
    cut: [...document.querySelectorAll(".wide")].filter((e) => shown(e) && e.scrollWidth > e.clientWidth + 1).map((e) => e.innerText.slice(0, 60)),
    folded: folded.filter((e) => !shown(e.lastElementChild)).length,
    configuration: Boolean(configuration && shown(configuration)),
  };
})()
